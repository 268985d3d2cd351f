"""The prediction as JSON, ``bench/results/counts/predict.json``: before a change, and after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import snapshot
from bench.harness import package_version, provenance
from bench.predict import hopper
from bench.predict.calls import SIZES, Size, sections
from bench.predict.kernel import Counter, Counts
from bench.predict.model import Times
from bench.predict.targets import NAMES, PATH
from bench.predict.timed import times

# Part, its fields, sizes, sections, rows.
_DEPTH = 5

Row = dict[str, Any]


def predicted(commit: str | None = None, sizes: Iterable[Size] = SIZES) -> dict[str, Any]:
    """Predict everything.

    Args:
        commit: of this tree, where git can't tell, or where only what predicts has changed since.
        sizes: of calls.
    """
    counter = Counter()
    cases: dict[str, dict[str, dict[str, Row]]] = {}
    for size in sizes:
        cases[str(size)] = {
            name: rows([times(step, size.images, counter) for step in steps])
            for name, steps in sections(size)
        }
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit or provenance()["commit"],
        "triton": package_version("triton"),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "l2_rates": list(hopper.L2_RATES),
        "cases": cases,
    }


def rows(parts: Iterable[Times]) -> dict[str, Row]:
    """By number and name."""
    return {f"{number:02} {part.name}": row(part) for number, part in enumerate(parts, 1)}


def row(part: Times) -> Row:
    """What the file holds of one launch."""
    made: Row = {
        "start_us": round(part.start, 2),
        "issue_us": round(part.issue, 2),
        "tensor_us": round(part.tensor, 2),
        "l2_us": [round(value, 2) for value in part.l2],
        "dram_us": round(part.dram, 2),
        "total_us": [round(part.total(rate), 2) for rate in range(len(part.l2))],
        "bound": part.bound(0),
    }
    if part.counts is not None:
        made |= _counted(part.counts)
    if part.phases:
        rates = range(len(part.l2))
        made["phases"] = {one.name: [round(one.work(rate), 2) for rate in rates] for one in part.phases}
    return made


def _counted(counts: Counts) -> Row:
    return {
        "variant": counts.variant,
        "programs": counts.programs,
        "warps": counts.warps,
        "registers": counts.registers,
        "shared": counts.shared,
        "resident": counts.resident,
        "waves": round(counts.waves, 2),
        "instructions": {name: round(value) for name, value in counts.instructions.items()},
        "gflop": round(2 * counts.multiply_adds / 1e9, 4),
        "l2_mb": round(counts.l2 / 1e6, 2),
        "stored_mb": round(counts.stored / 1e6, 3),
        "dram_mb": round(counts.dram / 1e6, 2),
        "followed": counts.followed,
        "notes": list(counts.notes),
    }


def write(name: str, part: Mapping[str, Any], path: Path = PATH) -> None:
    """Put one part into the file; the other stays."""
    parts = {**snapshot.read(path), name: part}
    snapshot.write(path, {key: parts[key] for key in NAMES if key in parts}, _DEPTH)
