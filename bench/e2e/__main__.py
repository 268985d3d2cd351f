"""Whole models, unpruned and pruned by several methods: ``python -m bench.e2e [--preset NAME] [--record]``.

Time to the first token, decoding, the stages of the vision side, memory; weights are random, since speed does
not depend on them. Nothing is timed before the gate is green.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.e2e import gate
from bench.e2e.captured import record_graph, record_nothing
from bench.e2e.measure import measure, setting
from bench.e2e.methods import NAMES, default_variant, methods
from bench.e2e.presets import PRESETS, Preset, rehearsal
from bench.e2e.prompts import prompt
from bench.harness import device_slug, provenance
from bench.micro.gates import GateError
from bench.record import ResultFile, Row, Rows, add_options, exit_code, folder_of
from ocvtp import OCPruner

_KEY = ("method", "mode", "batch", "text_tokens", "keep")


def run(
    preset: Preset, device: torch.device, path: Path, *, commit: str | None, minutes: float, console: Console
) -> tuple[ResultFile, bool]:
    """Check, then measure every cell that an earlier run of the same tree has left.

    Returns:
        The results so far, and whether they are complete.

    Raises:
        SystemExit: the gate is not green.
    """
    deadline = time.monotonic() + 60 * minutes
    console.print(f"{preset.name}: building a model with random weights on {device_slug(device)}")
    model, pruner = preset.build(device)
    first = preset.cells[0]
    inputs = prompt(model, image=preset.image, text_tokens=first.text_tokens, batch=first.batch)
    everything = _image_tokens(model, inputs)
    found = methods(model, pruner, preset.keep, everything)
    try:
        checked = gate.check(model, pruner, preset.keep, inputs, found)
    except GateError as error:
        raise SystemExit(f"gate failed at {preset.name}: {error}") from error
    for sentence in checked:
        console.print(f"checked: {sentence}", highlight=False)
    head = _head(preset, model, pruner, everything, checked, device, commit)
    results = ResultFile(path, head, _KEY)
    for cell in preset.cells:
        chosen = {name: method for name, method in found.items() if name in (cell.methods or NAMES)}
        if all(results.has(setting(cell, method)) for method in chosen.values()):
            continue
        if time.monotonic() > deadline:
            return results, False
        inputs = prompt(model, image=preset.image, text_tokens=cell.text_tokens, batch=cell.batch)
        rows = measure(
            cell,
            inputs,
            chosen,
            decode_tokens=preset.decode_tokens,
            rounds=preset.rounds,
            calls=preset.calls,
            record=record_graph if device.type == "cuda" else record_nothing,
        )
        for row in rows:
            results.add(row)
        show(preset.name, rows, console)
    return results, True


def _image_tokens(model: Any, inputs: Row) -> int:
    ids = inputs["input_ids"][0]
    return int((ids == model.config.image_token_id).sum())


def _head(
    preset: Preset,
    model: Any,
    pruner: OCPruner,
    everything: int,
    checked: Sequence[str],
    device: torch.device,
    commit: str | None,
) -> Row:
    total = sum(p.numel() for p in model.parameters())
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    vision = sum(p.numel() for p in tower.parameters())
    return {
        **provenance(device, commit),
        "preset": preset.name,
        "note": "a rehearsal on a tiny model: figures mean nothing" if preset.pruner else None,
        "weights": "random",
        "dtype": str(model.dtype).removeprefix("torch."),
        "image": list(preset.image),
        "image_tokens": everything,
        "keep": preset.keep,
        "default": default_variant(model, pruner, preset.keep),
        "decode_tokens": preset.decode_tokens,
        "parameters": {
            "vision": vision,
            "language": total - vision,
            "pruner": sum(p.numel() for p in pruner.parameters()),
        },
        "gate": list(checked),
    }


def show(name: str, rows: Rows, console: Console) -> None:
    """A table of one cell; ratios are of its first row."""
    first = rows[0]
    table = Table(
        "",
        "image tokens",
        "first token, ms",
        "",
        "language model, ms",
        "",
        "tokens/s",
        "cache, MB",
        "peak, GB",
        title=f"{name}: {first['mode']}, B = {first['batch']}, {first['text_tokens']} text tokens",
    )
    for row in rows:
        prefill = row["prefill_ms"]
        table.add_row(
            row["method"],
            str(row["keep"]),
            "{median:.1f} ({p20:.1f} - {p80:.1f})".format(**row["ttft_ms"]),
            f"{first['ttft_ms']['median'] / row['ttft_ms']['median']:.2f}x",
            f"{prefill['median']:.1f}" if prefill else "",
            f"{first['prefill_ms']['median'] / prefill['median']:.2f}x" if prefill else "",
            f"{row['decode_tokens_per_s']:.1f}" if row["decode_tokens_per_s"] else "",
            f"{row['kv_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; with ``--record`` also write. Exits with 3 if time ran out: run it again."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.e2e",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu-small")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a tiny model of the same family, to see that it runs"
    )
    add_options(parser)
    arguments = parser.parse_args(argv)
    preset, device = PRESETS[arguments.preset], torch.device(arguments.device)
    if arguments.rehearse:
        preset = rehearsal(preset)
    if preset.gpu and device.type == "cpu":
        parser.error(f"{preset.name} is built at its true size and needs a GPU; on a CPU: --preset cpu-small")
    path = folder_of(arguments) / f"e2e-{preset.name}.json"
    console = Console()
    results, complete = run(
        preset, device, path, commit=arguments.commit, minutes=arguments.minutes, console=console
    )
    console.print(f"{len(results.rows)} rows in {path}", highlight=False, soft_wrap=True)
    return exit_code(complete, console)


if __name__ == "__main__":
    raise SystemExit(main())
