"""The table of a record."""

from __future__ import annotations

from typing import Any

from bench.accuracy.rivals.contenders import DEFAULT, EVERYTHING
from bench.markdown import table


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Name of a block of the document -> Markdown."""
    rows = record["rows"]
    percents = list(dict.fromkeys(row["percent"] for row in rows))
    found = {(row["method"], row["percent"]): row for row in rows}
    keeps = {row["percent"]: row["keep"] for row in rows}
    head = [
        "",
        *(f"{p} % ({keeps[p]})" for p in percents),
        *(f"beyond ocvtp's default, {p} %" for p in percents),
    ]
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        of_it = [found[name, percent] for percent in percents]
        accuracy = [_pm(row["accuracy"]) for row in of_it]
        beyond = [
            "" if name in (DEFAULT, EVERYTHING) else _pm(row["over_default"], sign=True) for row in of_it
        ]
        note = next(row["note"] for row in of_it)
        lines.append([f"{name} ({note})" if note else name, *accuracy, *beyond])
    return {"rivals": table(head, lines)}


def _pm(values: list[float], *, sign: bool = False) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:{'+' if sign else ''}.1f} ± {(high - low) / 2:.1f}"
