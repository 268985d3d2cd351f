"""The one error of what is read back, before the reader makes it its own."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class Refused(ValueError):
    """Something stored is not what it has to be; the message names the field and says what is wrong."""


@contextlib.contextmanager
def refused_as(kind: type[Exception], path: Path, advice: str) -> Iterator[None]:
    """Make a :class:`Refused` out of ``path`` a ``kind`` that names the file and says what to do."""
    try:
        yield
    except Refused as error:
        raise kind(f"{path}: {error}; {advice}") from error


def shown(value: object) -> str:
    """``value`` for a message, however long, deep or large it is."""
    if type(value) is int and value.bit_length() > 100:  # Python refuses to spell out the largest ones
        return f"an int of {value.bit_length()} bits"
    return _SHORT.repr(value)
