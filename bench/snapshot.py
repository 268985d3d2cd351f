"""Counts that somebody accepted, kept in the repository as JSON, and how others differ from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Where snapshots lie. What they hold depends on versions, not on the machine that counted.
FOLDER = Path(__file__).parent / "results" / "counts"

Row = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The snapshot at ``path``, or an empty one if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, snapshot: Mapping[str, Any], depth: int) -> None:
    """Write ``snapshot``; what lies ``depth`` mappings deep takes one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_laid_out(snapshot, depth, "") + "\n")


def changes(old: Mapping[str, Row], new: Mapping[str, Row], *, whole: bool) -> list[str]:
    """A line for every number of ``new`` that is not that of ``old``, and for every row come or gone.

    Args:
        old: row by name, as accepted.
        new: as counted.
        whole: whether ``new`` is all that should be there, so that a row missing from it is one that is gone.
    """
    lines = []
    for name, row in new.items():
        if name not in old:
            lines.append(f"{name}: new, {json.dumps(row)}")
            continue
        before, after = _flat(old[name]), _flat(row)
        lines += [
            f"{name}: {field} {_said(before, field)} -> {_said(after, field)}"
            for field in (*before, *(field for field in after if field not in before))
            if before.get(field) != after.get(field)
        ]
    if whole:
        lines += [f"{name}: gone" for name in old if name not in new]
    return lines


def _flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """Numbers by path: ``{"launches": {"gather": 1}}`` -> ``{"launches.gather": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def _said(flat: Mapping[str, Any], field: str) -> str:
    return json.dumps(flat[field]) if field in flat else "none"


def _laid_out(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {_laid_out(item, depth - 1, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
