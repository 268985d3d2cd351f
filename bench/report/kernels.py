"""Blocks about kernels and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.e2e.methods import UNPRUNED
from bench.markdown import table
from bench.report.models import NOT_MEASURED, find, ours, ratio
from bench.report.results import Result, Results

Block = Callable[[Results], str]

#: Operation -> its file of results.
FAMILIES = {
    "selection": "micro-selection",
    "received attention": "micro-received-attention",
    "slot attention and pruner": "micro-slot-attention",
    "slot attention, training": "micro-slot-training",
    "reconstruction": "micro-reconstruction",
    "coverage": "micro-coverage",
    "merging": "micro-merge",
    "diversity": "micro-diversity",
}


def floors(results: Results) -> str:
    """Our kernels on GPUs against the least time that their work could take."""
    head = [
        "device",
        "operation",
        "case",
        "mode",
        "µs",
        "floor, µs",
        "set by",
        "of the floor",
        "over official",
    ]
    lines = []
    for family, name in FAMILIES.items():
        rows = [line for result in results.named(name) for line in _floor_rows(result)]
        lines += rows or [["GPU", family, *[NOT_MEASURED] * 7]]
    return table(head, lines)


def with_floors(result: Result) -> Iterator[dict[str, Any]]:
    """Rows of our kernels that have a floor."""
    for row in result.data["rows"]:
        if str(row["implementation"]).startswith("ours") and row.get("floor_us"):
            yield row


def _floor_rows(result: Result) -> Iterator[list[str]]:
    for row in with_floors(result):
        over = row.get("speedup_over", {}).get("official")
        yield [
            result.folder,
            row["op"],
            f"{row['case']}, B={row['shape'].get('B', 1)}",
            row["mode"],
            f"{row['median_us']:.1f}",
            f"{row['floor_us']:.1f}",
            row["floor_set_by"],
            f"{row['percent_of_floor']:.0f} %",
            f"{over:.1f}x" if over else "",
        ]


def targets(results: Results) -> str:
    """What we set out to reach, and what was measured."""
    head = ["target", "at least / at most", "measured", "verdict"]
    rows: list[tuple[str, float, bool, float | None, str]] = [
        ("H100: pruner, 576 to 64 tokens, B = 1", 60.0, False, _pruner_us(results, 1), "µs"),
        ("H100: pruner, 576 to 64 tokens, B = 64", 750.0, False, _pruner_us(results, 64), "µs"),
        (
            "H100: LLaVA-NeXT-7B, 2880 to 160, first token, B = 1",
            6.0,
            True,
            _gpu(results, "llava-next-7b", 1),
            "x",
        ),
        (
            "H100: LLaVA-1.5-7B, 576 to 64, first token, B = 8",
            3.0,
            True,
            _gpu(results, "llava-1.5-7b", 8),
            "x",
        ),
        ("CPU: pruner against the official dataflow", 1.2, True, _cpu_pruner(results), "x"),
        ("CPU: language-model prefill, 576 to 64, 0.5 B", 5.0, True, _cpu(results, "prefill_ms"), "x"),
        ("CPU: first token, tower included", 2.0, True, _cpu(results, "ttft_ms"), "x"),
    ]
    lines = []
    for name, target, least, got, unit in rows:
        met = got is not None and (got >= target if least else got <= target)
        space = "" if unit == "x" else " "
        lines.append(
            [
                name,
                f"{'≥' if least else '≤'} {target:g}{space}{unit}",
                NOT_MEASURED if got is None else f"{got:.3f}{space}{unit}",
                NOT_MEASURED if got is None else ("met" if met else "**missed**"),
            ]
        )
    return table(head, lines)


def _pruner_us(results: Results, batch: int) -> float | None:
    """The pruner with its selection, as a CUDA graph, in the default precision."""
    found = [
        row["median_us"]
        for result in results.named("micro-slot-attention")
        if result.on_gpu
        for row in result.data["rows"]
        if row["op"] == "pruner"
        and row["mode"] == "graph"
        and str(row["implementation"]).startswith("ours")
        and (row["shape"]["B"], row["shape"]["N"], row["shape"]["K"]) == (batch, 576, 64)
    ]
    return min(found, default=None)


def _gpu(results: Results, preset: str, batch: int) -> float | None:
    """The better of eager and captured."""
    pairs = [
        tuple(
            find(result, method=name, mode=mode, batch=batch, text_tokens=32)
            for name in (UNPRUNED, ours(result))
        )
        for result in results.named(f"e2e-{preset}")
        if result.on_gpu
        for mode in ("eager", "captured prefill")
    ]
    return max((ratio(before, after) for before, after in pairs if before and after), default=None)


def _cpu(results: Results, what: str) -> float | None:
    result = results.one("e2e-cpu-small")
    if result is None:
        return None
    before, after = (find(result, method=name, mode="eager", batch=1) for name in (UNPRUNED, ours(result)))
    return ratio(before, after, what) if before and after else None


def _cpu_pruner(results: Results) -> float | None:
    result = results.one("pruner")
    return None if result is None else result.data["rows"][0]["speedup"]


def files(results: Results) -> str:
    """Every file of results and where it is from."""
    head = ["file", "device", "commit", "date", "versions"]
    lines = [
        [f"{one.folder}/{one.name}", one.device, one.commit, str(one.data["date"])[:10], one.versions]
        for one in sorted(results.all, key=lambda one: (one.folder, one.name))
    ]
    return table(head, lines)
