"""Curves of cost with fitted exponents, and the settings in which pruning does not pay:
``python -m bench.scaling [--record]``. Weights are random; nothing is timed before its gate is green.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import provenance
from bench.micro.gates import GateError
from bench.record import ResultFile, add_options, exit_code, folder_of
from bench.scaling.limits import limits
from bench.scaling.sizes import CPU, GPU, Scale
from bench.scaling.sweeps import model_curves, pruner_curves


def run(
    scale: Scale, device: torch.device, folder: Path, *, commit: str | None, minutes: float, console: Console
) -> bool:
    """Measure what an earlier run of the same tree has left; whether everything is there."""
    deadline = time.monotonic() + 60 * minutes
    head = {
        **provenance(device, commit),
        "note": None,
        "weights": "random",
        "models": scale.name,
        "dtype": "float32" if device.type == "cpu" else "bfloat16",
    }
    curves = ResultFile(folder / "scaling.json", head, ("what", "axis", "fixed"), name="sweeps")
    rows = ResultFile(folder / "limits.json", head, ("what",))

    def done(what: str, axis: str, fixed: Any) -> bool:
        return curves.has({"what": what, "axis": axis, "fixed": dict(fixed)})

    parts: list[tuple[ResultFile, Callable[[], Iterator[dict[str, Any]]], Any]] = [
        (curves, lambda: pruner_curves(scale, device, done), _show_curve),
        (curves, lambda: model_curves(scale, device, done), _show_curve),
        (rows, lambda: limits(scale, device, lambda what: rows.has({"what": what})), _show_limit),
    ]
    for results, make, show in parts:
        for row in make():
            results.add(row)
            show(row, console)
            if time.monotonic() > deadline:
                return False
    return True


def _show_curve(row: dict[str, Any], console: Console) -> None:
    table = Table(
        row["axis"], "ms (p20 - p80)", "memory, MB", "GFLOP", title=f"{row['what']}, {row['fixed']}"
    )
    for one in row["points"]:
        table.add_row(
            str(one["x"]),
            "{median:.2f} ({p20:.2f} - {p80:.2f})".format(**one["ms"]),
            f"{one['peak_bytes'] / 1e6:.1f}",
            "" if one["flops"] is None else f"{one['flops'] / 1e9:.2f}",
        )
    fits = (row["fits"][name] for name in ("ms", "peak_bytes", "flops"))
    table.add_row("exponent", *("" if fit is None else f"{fit['exponent']:.2f}" for fit in fits))
    console.print(table)


def _show_limit(row: dict[str, Any], console: Console) -> None:
    console.print(
        f"{row['what']}: {row['unpruned_ms']['median']:.1f} -> {row['pruned_ms']['median']:.1f} ms, "
        f"{row['speedup']:.2f}x",
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; with ``--record`` also write. Exits with 3 if time ran out: run it again."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    console = Console()
    try:
        complete = run(
            GPU if device.type == "cuda" else CPU,
            device,
            folder_of(arguments),
            commit=arguments.commit,
            minutes=arguments.minutes,
            console=console,
        )
    except GateError as error:
        raise SystemExit(f"gate failed: {error}") from error
    return exit_code(complete, console)


if __name__ == "__main__":
    raise SystemExit(main())
