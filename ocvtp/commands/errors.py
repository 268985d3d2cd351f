"""Mistakes a person can mend, told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

EXIT_USER_ERROR = 2


class UserError(Exception):
    """The user asked for something that can't be; the message says what to do instead."""


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turn mistakes in the user's input into a message and exit code 2; let everything else through.

    ``ValueError`` and ``TypeError`` count as such: the package raises them for arguments it can't use.
    """
    from ocvtp_kernels import BackendUnavailableError

    try:
        yield
    except (UserError, ValueError, TypeError, OSError, BackendUnavailableError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(message)}", highlight=False)
        raise typer.Exit(EXIT_USER_ERROR) from error


def _plain(text: str) -> str:
    """Keep rich from reading ``[B, N, C]`` as markup."""
    return text.replace("[", r"\[")
