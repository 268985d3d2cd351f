"""Progress bars. They vanish when done, and are not drawn where nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

# Few enough that drawing does not disturb what is being timed.
_PER_SECOND = 4


@contextlib.contextmanager
def busy(console: Console, description: str) -> Iterator[None]:
    """A bar that moves for as long as one call of unknown length takes."""
    with _bar(console, TimeElapsedColumn()) as progress:
        progress.add_task(description, total=None)
        yield


@contextlib.contextmanager
def steps(console: Console, description: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps; call what it yields before each of them, with what comes next."""
    with _bar(console, MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(description, total=total)
        begun = False

        def step(text: str) -> None:
            nonlocal begun
            if begun:
                progress.advance(task)
            begun = True
            progress.update(task, description=f"{description}: {text}")

        yield step


@contextlib.contextmanager
def share(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of how much is done; call what it yields with done and all."""
    with _bar(console, TimeElapsedColumn()) as progress:
        task = progress.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield show


def _bar(console: Console, *columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        refresh_per_second=_PER_SECOND,
        disable=not console.is_terminal,
    )
