"""Blocks about what kernels would take on an H100: a model's figures, made by ``python -m bench.predict``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bench.markdown import table
from bench.predict import hopper
from bench.predict.targets import BY_ROWS, NAMES, SECTIONS, totals, verdicts
from bench.report.results import Result, Results

NOT_PREDICTED = "not predicted"
_CLASSES = ("mma", "async", "memory", "shared", "mufu", "shfl", "fp", "int", "sync", "branch")
_RATES = " / ".join(f"{rate / 1e3:g}" for rate in hopper.L2_RATES)

ASSUMED = (
    f"Assumed: {hopper.PROCESSORS} multiprocessors at {hopper.CLOCK:g} MHz, each with {hopper.SCHEDULERS} "
    f"schedulers, which issue {hopper.ISSUE[-1][1]:g} instructions a clock with one warp, "
    f"{hopper.ISSUE[-2][1]:g} with two, 1 with more; {2 * hopper.MULTIPLY_ADDS} FLOP a clock on tensor "
    f"cores, of which {100 * hopper.TENSOR_SHARE:g} % are reached; {_RATES} KB a microsecond from L2 to a "
    f"multiprocessor (two figures where they differ); {hopper.START:g} us to start a kernel of a graph, "
    f"{hopper.START_LARGE:g} above {hopper.FEW_IMAGES} images, {hopper.START_DEPENDENT:g} as a "
    f"programmatic dependent launch; {hopper.PHASE:g} us between phases of one launch; "
    f"{hopper.DRAM / 1e6:g} TB/s where a launch touches more than L2's {hopper.L2 // 1024**2} MB. Sources "
    "are in `bench/predict/hopper.py`. A launch takes its start and then the longest of issue, tensor, L2 "
    "and memory; launches don't overlap."
)
WEAKEST = (
    "Weakest: the rate of L2, which decides large batches (hence two); instructions a clock of a single "
    "warp, and the start, which decide B=1. Latency of dependent loads, barriers and bank conflicts is in "
    "no term. All of a warp's sectors count as L2's, though some will hit L1; weights count as lying in L2, "
    "where a tower beside may have driven them out. PyTorch's own kernels (in *exposed* and *captured*) are "
    "bytes and FLOPs alone, with the start of a graph's kernel though they may be launched one by one. "
    "Time on the host is in none."
)


def _parts(results: Results) -> Iterator[tuple[str, Result]]:
    for name in NAMES:
        found = results.one(f"predict {name}")
        if found is not None:
            yield name, found


def totals_table(results: Results) -> str:
    """Microseconds of every call, by part of the file, and what that means for the targets."""
    parts = dict(_parts(results))
    if not parts:
        return NOT_PREDICTED
    sizes = list(dict.fromkeys(size for part in parts.values() for size in part.data["cases"]))
    lines = []
    for size in sizes:
        for section, meaning in SECTIONS.items():
            cells = [_total(parts.get(name), size, section) for name in NAMES]
            if any(cell != NOT_PREDICTED for cell in cells):
                lines.append([size, f"{section}: {meaning}", *cells])
    made = [f"A model, not a measurement; µs at {_RATES} KB a microsecond of L2.", ""]
    made.append(table(["call", "part", *NAMES], lines))
    rows = [
        [
            f"{one.name}, {name}",
            f"≤ {one.most:g} µs",
            " / ".join(f"{value:.0f} µs" for value in one.predicted),
            "would be met" if one.met else "**would be missed**",
        ]
        for name, part in parts.items()
        for one in verdicts(part.data)
    ]
    made += [
        "",
        table(["target", "at most", "predicted", "verdict"], rows),
        "",
        ASSUMED,
        "",
        WEAKEST,
        "",
    ]
    made += [_origin(name, part) for name, part in parts.items()]
    return "\n".join(made)


def _total(part: Result | None, size: str, section: str) -> str:
    rows = part.data["cases"].get(size, {}).get(section) if part is not None else None
    if not rows:
        return NOT_PREDICTED
    return f"{' / '.join(f'{value:.0f}' for value in totals(rows))} ({len(rows)} launches)"


def _origin(name: str, part: Result) -> str:
    return (
        f"{name.capitalize()}: {part.commit}, predicted on {part.data['date']} from code by triton "
        f"{part.data['triton']}, with torch {part.data['torch']}.\n"
    )


#: Whose launches a document lists: the rest is in the file.
_LISTED = ("slots", "exposed")


def latest_tables(results: Results) -> str:
    """Tables of the latest prediction of what there is, launch by launch."""
    parts = {name: part for name, part in _parts(results) if name != BY_ROWS}
    if not parts:
        return NOT_PREDICTED
    name, part = list(parts.items())[-1]
    listed = {
        size: {section: rows for section, rows in found.items() if section in _LISTED}
        for size, found in part.data["cases"].items()
    }
    return f"{_origin(name, part)}\n{kernel_tables({'cases': listed})}"


def kernel_tables(part: Mapping[str, Any]) -> str:
    """A table for every call and part of it: each launch, those that are alike in one row."""
    made = []
    for size, found in part["cases"].items():
        for section, rows in found.items():
            values = " / ".join(f"{value:.1f}" for value in totals(rows))
            made += [f"**{size}, {section}**: {values} µs, a model", "", _launches(rows), ""]
    return "\n".join(made).rstrip()


def _launches(rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = [
        "launch",
        "programs / warps",
        "registers / KB",
        "on one SM",
        "waves",
        "instructions a warp",
        " / ".join(_CLASSES),
        "GFLOP",
        "MB L2 / memory",
        "issue, µs",
        "tensor",
        "L2",
        "with start",
        "set by",
    ]
    alike: dict[str, list[str]] = {}
    for name, row in rows.items():
        alike.setdefault(json.dumps([name.partition(" ")[2], row]), []).append(name.partition(" ")[0])
    lines, notes = [], []
    for key, numbers in alike.items():
        name, row = json.loads(key)
        noted = "\\*" * bool(row.get("notes"))
        lines.append([f"{', '.join(numbers)} {name} {row.get('variant', '')}".rstrip() + noted, *_cells(row)])
        notes += [f"\\* {name}: {note}." for note in row.get("notes", ())]
        if row.get("phases"):
            notes.append(f"{name}, phases without the waits between them: {_phases(row['phases'])}.")
    return "\n".join([table(head, lines), *(f"\n{note}" for note in dict.fromkeys(notes))])


def _phases(phases: Mapping[str, list[float]]) -> str:
    said = {name: " / ".join(f"{us:.1f}" for us in values) for name, values in phases.items()}
    return ", ".join(f"{name} {values} µs" for name, values in said.items())


def _cells(row: Mapping[str, Any]) -> list[str]:
    counted = ["PyTorch's", *[""] * 7]
    if "programs" in row:
        classes = row["instructions"]
        counted = [
            f"{row['programs']} / {row['warps']}",
            f"{row['registers']} / {row['shared'] / 1024:.0f}",
            str(row["resident"]),
            f"{row['waves']:.2f}",
            str(sum(classes.values())),
            " / ".join(str(classes[name]) for name in _CLASSES),
            f"{row['gflop']:.3f}",
            f"{row['l2_mb']:.1f} / {row['dram_mb']:.1f}",
        ]
    return [
        *counted,
        f"{row['issue_us']:.2f}",
        f"{row['tensor_us']:.2f}",
        " / ".join(f"{value:.2f}" for value in row["l2_us"]),
        " / ".join(f"{value:.1f}" for value in row["total_us"]),
        row["bound"],
    ]
