"""JSON objects as we write them: UTF-8, finite numbers, every key once. Everything else is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ocvtp.stored.refused import Refused, shown


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Refused: no file, one that can't be read, or no such object in it. The path is not in the message.
    """
    if not path.exists():
        raise Refused("it is missing")
    if not path.is_file():  # a pipe would be waited for
        raise Refused("it is a folder, not a file" if path.is_dir() else "it is no regular file")
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        raise Refused(f"it can't be read ({error.strerror or error})") from error


def parse_object(text: bytes | str) -> dict[str, Any]:
    """The JSON object that ``text`` spells.

    Raises:
        Refused: it spells something else.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.startswith("\ufeff"):
            raise Refused("it starts with a byte-order mark, which JSON has not")
        values = json.loads(text, parse_constant=_not_finite, parse_float=_finite, object_pairs_hook=_once)
    except Refused:
        raise
    except UnicodeDecodeError as error:
        raise Refused(f"it is no text in UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise Refused("it is nested too deeply") from error
    except ValueError as error:
        raise Refused(f"it can't be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refused(f"it must be a JSON object; got {shown(values)}")
    return values


def _not_finite(name: str) -> NoReturn:
    raise Refused(f"it can't be read as JSON ({name} is no number there)")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Refused(f"it can't be read as JSON ({shown(digits)} is beyond any float)")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise Refused(f"{key} is in it twice")
        values[key] = value
    return values
