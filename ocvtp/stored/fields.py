"""Dataclasses as schemas: every field of what was read has its type, and is within its bounds.

A field's annotation says all: ``Annotated[int, Within(1, 4096)]``, ``Literal["a", "b"]``, ``str | None``,
``tuple[Record, ...]`` of another dataclass. Nothing is converted but lists to tuples, objects to
dataclasses and NumPy's numbers and arrays to Python's: ``8.0``, ``"8"`` and ``true`` are no ints.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ocvtp.stored.refused import Refused, shown
from ocvtp_kernels._checks import as_int, as_number

Made = TypeVar("Made")


@dataclass(frozen=True)
class Within:
    """Bounds of a number; of a list or tuple, of how many things are in it.

    Attributes:
        least: the smallest.
        most: the largest.
        above: ``least`` itself is too small.
        below: ``most`` itself is too large.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """NaN is nowhere within; ints are compared exactly, of whatever size."""
        enough = value > self.least if self.above else value >= self.least
        return enough and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        return (
            f"{'above' if self.above else 'of at least'} {_plain(self.least)} and "
            f"{'below' if self.below else 'at most'} {_plain(self.most)}"
        )


def from_object(kind: type[Made], values: object, where: str = "") -> Made:
    """A ``kind``, a dataclass, from what JSON held.

    Args:
        kind: its annotations are the schema; fields with a default may be left out.
        values: a mapping of its fields.
        where: of it in the file, as ``shards[3].``, for messages.

    Raises:
        Refused: names the field that is missing, unknown, of another type or out of bounds.
    """
    made = _check_object(kind, values, where)
    try:
        return kind(**made)
    except Refused as error:
        raise Refused(f"{where}{error}") from error


def check_fields(instance: object) -> None:
    """For ``__post_init__`` of a frozen dataclass that people make themselves: lists become tuples.

    Raises:
        ValueError: names class and field.
    """
    kind: type = type(instance)
    for name, hint in _hints(kind).items():
        try:
            value = check_value(hint, getattr(instance, name), name)
        except Refused as error:
            raise ValueError(f"{kind.__name__}.{error}") from error
        object.__setattr__(instance, name, value)


def check_known(kind: type, values: Mapping[str, Any]) -> None:
    """Raise :class:`Refused` unless every key of ``values`` is a field of ``kind``; says which there are."""
    known = list(_hints(kind))
    if unknown := sorted(set(values) - set(known)):
        listed = ", ".join(map(shown, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise Refused(f"unknown field(s) {listed}; there are: {', '.join(known)}")


def _check_object(kind: type, values: object, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise Refused(f"{where.rstrip('.') or 'it'} must be an object; got {shown(values)}")
    try:
        check_known(kind, values)
    except Refused as error:
        raise Refused(f"{where.rstrip('.')}: {error}" if where else str(error)) from error
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise Refused(f"{where.rstrip('.') or 'it'} lacks {', '.join(missing)}")
    return {n: check_value(h, values[n], where + n) for n, h in _hints(kind).items() if n in values}


def check_value(hint: Any, value: Any, name: str) -> Any:
    """``value``, called ``name``, as the annotation ``hint`` says.

    Raises:
        Refused: it is something else, or out of bounds.
    """
    within: Within | None = None
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        within = next((mark for mark in marks if isinstance(mark, Within)), None)
    if hint is Any:
        return value
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return value if isinstance(value, hint) else from_object(hint, value, name + ".")
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        choices = get_args(hint)
        if value is None and type(None) in choices:
            return None
        (hint,) = (choice for choice in choices if choice is not type(None))
        return check_value(Annotated[hint, within] if within else hint, value, name)
    if origin in (list, tuple):
        return _check_row(origin, get_args(hint)[0], within, value, name)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise Refused(f"{name} must be an object; got {shown(value)}")
        return {key: check_value(get_args(hint)[1], item, f"{name}.{key}") for key, item in value.items()}
    value = _plainly(hint, value)
    if not _fits(hint, value) or (within is not None and not within.holds(value)):
        raise Refused(f"{name} must be {_meaning(hint)}{f' {within}' if within else ''}; got {shown(value)}")
    return value


def _check_row(kind: Any, hint: Any, within: Within | None, value: Any, name: str) -> Any:
    if not isinstance(value, (list, tuple)) and hasattr(value, "tolist"):  # an array of somebody's
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise Refused(f"{name} must be a list; got {shown(value)}")
    if within is not None and not within.holds(len(value)):
        raise Refused(f"{name} must be a list with a length {within}; got {len(value)}")
    return kind(check_value(hint, item, f"{name}[{i}]") for i, item in enumerate(value))


def _plainly(hint: Any, value: Any) -> Any:
    """A number of another library as Python's own; everything else as it is."""
    number = as_int(value) if hint is int else as_number(value) if hint is float else None
    return value if number is None else number


def _fits(hint: Any, value: object) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    assert hint in (str, bool), hint
    return isinstance(value, hint)


def _meaning(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(hint))
    return {int: "an int", float: "a number", str: "text", bool: "true or false"}[hint]


def _plain(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.lru_cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}
