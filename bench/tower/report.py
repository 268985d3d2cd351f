"""Tables of steps, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(name: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table for each part and number of images; shares are of its first row."""
    for part, batch in dict.fromkeys((row["part"], row["B"]) for row in rows):
        of_part = [row for row in rows if (row["part"], row["B"]) == (part, batch)]
        table = Table("", "GFLOP", "share", "ms (p20 - p80)", "share", title=f"{name}: {part}, B = {batch}")
        for row in of_part:
            table.add_row(
                row["what"],
                f"{row['gflop']:.2f}",
                f"{row['gflop'] / of_part[0]['gflop']:.3f}",
                "{median:.1f} ({p20:.1f} - {p80:.1f})".format(**row["ms"]),
                f"{row['ms']['median'] / of_part[0]['ms']['median']:.3f}",
            )
        console.print(table)


def record(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write one shape's figures, leaving those of other shapes, each with a provenance of its own."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, name: result}, indent=1) + "\n")
