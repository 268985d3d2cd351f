"""The pruner on a CPU against the official dataflow: ``python -m bench.pruner [--out FILE.json]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import Timing, interleaved, provenance
from bench.official import official_attention, official_selection
from ocvtp import OCPruner
from ocvtp.pruner.noise import seeded_normal
from ocvtp_kernels.selection import select_tokens

SHAPES = [(1, 576, 64), (8, 576, 64), (1, 576, 192)]


def measure_forward(pruner: OCPruner, batch: int, tokens: int, keep: int, seconds: float) -> dict[str, Any]:
    """Gate, then time the whole pruner, selection included, on the same features and noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, pruner.config.in_dim, generator=generator)
    received = torch.rand(batch, tokens, generator=generator)
    noise = seeded_normal(keep, pruner.config.slot_dim, 0)[None]
    weights = pruner.weights()

    def official() -> list[list[int]]:
        attention = official_attention(x, pruner.initial_slots(noise).detach(), weights)
        return [official_selection(attention[i : i + 1], received[i], keep) for i in range(batch)]

    def ours() -> torch.Tensor:
        return pruner(x, keep=keep, fill_scores=received, seed=0).indices

    if ours().tolist() != official():
        raise SystemExit(
            f"gate failed at {(batch, tokens, keep)}: kept tokens differ from the official dataflow"
        )
    timings = interleaved({"official": official, "ocvtp": ours}, seconds=seconds)
    return _row("pruner forward", (batch, tokens, keep), timings)


def measure_selection(tokens: int, keep: int, seconds: float) -> dict[str, Any]:
    """Selection alone, where slots agree on tokens and the budget must be filled."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, keep, tokens, generator=generator)
    logits[:, 1::2] = logits[:, 0::2][:, : keep // 2]  # every second slot repeats its neighbour
    attention = logits.softmax(dim=1)
    received = torch.rand(1, tokens, generator=generator)
    indices, from_slots = select_tokens(attention, keep, received)
    if indices[0].tolist() != official_selection(attention, received[0], keep):
        raise SystemExit("gate failed: selections differ")
    timings = interleaved(
        {
            "official": lambda: official_selection(attention, received[0], keep),
            "ocvtp": lambda: select_tokens(attention, keep, received),
        },
        seconds=seconds,
    )
    row = _row("selection", (1, tokens, keep), timings)
    return {**row, "distinct_picks": int(from_slots[0])}


def _row(what: str, shape: tuple[int, int, int], timings: dict[str, Timing]) -> dict[str, Any]:
    return {
        "what": what,
        "shape": dict(zip(("B", "N", "K"), shape, strict=True)),
        "speedup": timings["official"].median / timings["ocvtp"].median,
        **{name: timing.to_dict() for name, timing in timings.items()},
    }


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--seconds", type=float, default=20.0, help="time spent on each row")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pruner = OCPruner().eval()
    rows = [measure_forward(pruner, *shape, arguments.seconds) for shape in SHAPES]
    rows.append(measure_selection(576, 192, arguments.seconds))
    result = {**provenance(), "weights": "random", "rows": rows}

    table = Table("what", "B, N, K", "official dataflow", "ocvtp", "speed-up", title="CPU, float32")
    for row in rows:
        table.add_row(
            row["what"],
            ", ".join(str(size) for size in row["shape"].values()),
            str(Timing(**row["official"])),
            str(Timing(**row["ocvtp"])),
            f"{row['speedup']:.2f}x",
        )
    Console().print(table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
