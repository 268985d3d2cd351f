"""What can become of a file: a table of alterations, each one that hands, tools or disks make.

Every alteration is a name and a function from the file's bytes to other bytes; those of JSON say which
field they touch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ocvtp.stored.seal import SEAL

#: In place of any value. A number's neighbour, and its negative, come on top of these.
ODD = (10**12, 10**400, -1, 0.5, True, None, "", "text", [], [1], {}, {"a": 1})


class Alteration(NamedTuple):
    """One way to change a file.

    Attributes:
        name: for the test's id.
        apply: old bytes to new ones.
        field: top-level field of the JSON object that it touches; empty if none, or all.
    """

    name: str
    apply: Callable[[bytes], bytes]
    field: str = ""


def of_values(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, altered object and touched top-level field, for every place in ``values`` (lists: the first)."""
    for path, value in _places(values):
        at = ".".join(map(str, path))
        field = str(path[0])
        if field == SEAL:  # a digest names its field, all of them together none
            field = str(path[1]) if len(path) > 1 else ""
        near = [value + 1, -value - 1] if type(value) in (int, float) else []
        for odd in (*near, *(ODD if len(path) <= 2 else ODD[::3])):
            if type(odd) is not type(value) or odd != value:
                yield f"{at}={str(odd)[:14]}", _with(values, path, lambda _, odd=odd: odd), field
        yield f"{at} missing", _without(values, path), field
        if isinstance(value, dict):
            yield (
                f"{at} more",
                _with(values, path, lambda old: {**old, "more": 1}),
                "more" if path[0] == SEAL else field,
            )
        if isinstance(value, list) and value:
            for name, change in LISTS.items():
                if change(value) != value:
                    yield f"{at} {name}", _with(values, path, change), field
    yield "one field more", {**values, "more": 1}, "more"


LISTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "twice": lambda old: [old[0], *old],
    "without the last": lambda old: old[:-1],
    "backwards": lambda old: old[::-1],
}


def of_json() -> Iterator[Alteration]:
    """Texts that are no JSON object as we write it."""
    first = lambda text: text.index(b'"', text.index(b"{"))  # noqa: E731
    yield from of_bytes()
    yield Alteration("no JSON", lambda old: b"this is no JSON")
    yield Alteration("a list", lambda old: b"[" + old + b"]")
    yield Alteration("a number", lambda old: b"1")
    yield Alteration("null", lambda old: b"null")
    yield Alteration("an empty object", lambda old: b"{}")
    yield Alteration("byte-order mark", lambda old: b"\xef\xbb\xbf" + old)
    yield Alteration("UTF-16", lambda old: old.decode().encode("utf-16"))
    yield Alteration("no UTF-8", lambda old: old.replace(b'"', b'"\xff', 1))
    for literal in (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 10**5):
        yield Alteration(
            f"first field {literal[:5].decode()}",
            lambda old, literal=literal: old[: first(old)] + b'"x": ' + literal + b", " + old[first(old) :],
        )
    yield Alteration("a key twice", lambda old: _with_first_key_twice(old, first(old)))


def of_bytes() -> Iterator[Alteration]:
    """What disks and copying do to any file."""
    yield Alteration("empty", lambda old: b"")
    for part in (0.01, 0.5, 0.99):
        yield Alteration(f"cut at {part}", lambda old, part=part: old[: int(len(old) * part)])
    yield Alteration("a byte short", lambda old: old.rstrip()[:-1])
    yield Alteration("zeros at the start", lambda old: bytes(16) + old[16:])
    for part in (0.3, 0.6, 0.9):
        yield Alteration(f"zeros at {part}", lambda old, part=part: _overwritten(old, part, bytes(64)))
    for i in range(12):
        yield Alteration(f"bit flipped at {i}/12", lambda old, i=i: _flipped(old, (len(old) * i) // 12 + i))
    yield Alteration("last bit flipped", lambda old: _flipped(old.rstrip(), len(old.rstrip()) - 1))


def _flipped(old: bytes, at: int) -> bytes:
    data = bytearray(old)
    data[min(at, len(data) - 1)] ^= 1 << (at % 7)
    return bytes(data)


def _overwritten(old: bytes, part: float, by: bytes) -> bytes:
    at = min(int(len(old) * part), len(old) - len(by))
    return old[:at] + by + old[at + len(by) :]


def _with_first_key_twice(old: bytes, at: int) -> bytes:
    return old[:at] + old[at : old.index(b":", at)] + b': "other", ' + old[at:]


def _places(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    children: Any = ()
    if isinstance(values, dict):
        children = values.items()
    elif isinstance(values, list):
        children = list(enumerate(values))[:1]
    for key, value in children:
        yield (*path, key), value
        yield from _places(value, (*path, key))


def _with(values: Any, path: tuple[str | int, ...], change: Callable[[Any], Any]) -> Any:
    made = copy.deepcopy(values)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = change(place[path[-1]])
    return made


def _without(values: Any, path: tuple[str | int, ...]) -> Any:
    made = copy.deepcopy(values)
    place = made
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return made


def harmless() -> Iterator[Alteration]:
    """The same object in another spelling."""
    yield Alteration("spread out", lambda old: json.dumps(json.loads(old), indent=7).encode())
    yield Alteration("in one line", lambda old: json.dumps(json.loads(old)).encode())
    yield Alteration("sorted", lambda old: json.dumps(json.loads(old), sort_keys=True).encode())
    yield Alteration("line ends", lambda old: old.replace(b"\n", b"\r\n"))
