"""What each step of doing less in a vision tower saves: ``python -m bench.tower [--record] [--shape NAME]``.

Random weights; how long a tower takes does not depend on them. Every step is compared with transformers'
results before it is timed. On a CPU one image in float32 on one thread, by processor time; on a GPU one image
and four in bfloat16, eager calls, by the wall clock.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from bench.harness import device_slug, provenance
from bench.tower.encoder import ENCODERS, EncoderShape
from bench.tower.qwen import QWENS, QwenShape
from bench.tower.report import record, show
from bench.tower.step import clock_of, measure

SHAPES: dict[str, EncoderShape | QwenShape] = {**ENCODERS, **QWENS}


def main() -> None:
    """Measure, print tables, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: clip-l-336")
    parser.add_argument("--batch", type=int, action="append", help="images; default: 1, on a GPU 1 and 4")
    parser.add_argument("--seconds", type=float, default=30.0, help="time spent on each part")
    parser.add_argument("--least", type=int, default=3, help="but time each step at least this often")
    parser.add_argument("--record", action="store_true", help="write RESULTS/<device>/tower.json")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--commit", help="of this tree, where git can't tell")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    batches = arguments.batch or ([1] if device.type == "cpu" else [1, 4])
    for name in arguments.shape or ["clip-l-336"]:
        rows = []
        for batch in batches:
            rows += measure(SHAPES[name].bench(batch, device), device, arguments.seconds, arguments.least)
        show(f"{name}, {rows[0]['dtype']}, {device_slug(device)}, {clock_of(device)} time", rows, Console())
        if arguments.record:
            facts = {"clock": clock_of(device), "weights": "random"}
            result = {**provenance(device, arguments.commit), **facts, "rows": rows}
            record(arguments.results / device_slug(device) / "tower.json", name, result)


if __name__ == "__main__":
    main()
