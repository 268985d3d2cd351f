"""Mistakes a person can mend, told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

EXIT_USER_ERROR = 2


class UserError(Exception):
    """The user asked for something that can't be; the message says what to do instead."""


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turn a :class:`UserError` into a message and exit code 2; let everything else through.

    A ``ValueError`` out of a model's depths is not the user's doing: it keeps its traceback and exits with 1.
    """
    try:
        yield
    except UserError as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
        raise typer.Exit(EXIT_USER_ERROR) from error


@contextlib.contextmanager
def blamed_on_input(*kinds: type[Exception]) -> Iterator[None]:
    """Around calls that judge what the user gave: errors of these ``kinds`` become a :class:`UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error) or type(error).__name__) from error
