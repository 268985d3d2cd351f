"""Tables and a picture of what kept tokens are worth: ``python -m bench.evidence``.

Takes a vision encoder in Hugging Face's layout, photographs, and trained pruners. Every third photograph,
which its content alone decides, is measured and must not be trained on: ``--training-part FOLDER`` gathers
the others for ``ocvtp features``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.agreement import Encoder, find_photographs, split
from bench.chart import Panel, chart
from bench.evidence.report import find, tables
from bench.evidence.rows import ALWAYS, BUDGETS, Row, all_rows
from bench.evidence.selectors import RANDOM
from bench.evidence.views import views
from bench.harness import device_slug, provenance
from bench.markdown import replace_blocks
from bench.pruners import named, training_notes
from ocvtp import OCPruner

_ROOT = Path(__file__).parents[2]
_DOCUMENT = _ROOT / "docs" / "evidence.md"
_PICTURE = _ROOT / "docs" / "evidence.png"
_RESULTS = _ROOT / "bench" / "results"
#: Drawn, besides pruners; more lines could not be told apart.
_DRAWN_RIVALS = ("uniform grid", "farthest point", "k-medoids", "greedy DPP")


def gather(photographs: Sequence[Path], out: Path) -> int:
    """Link the photographs to train on into ``out``, named by content; how many."""
    trained_on, _ = split(find_photographs(photographs))
    out.mkdir(parents=True, exist_ok=True)
    for photograph in trained_on:
        link = out / f"{photograph.digest[:16]}{photograph.path.suffix.lower()}"
        if not link.exists():
            link.symlink_to(photograph.path.resolve())
    return len(trained_on)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; what a record holds.

    Raises:
        SystemExit: no photograph to measure, or a pruner of another encoder.
    """
    pruners: dict[str, OCPruner] = {}
    notes: dict[str, Any] = {}
    for name, folder in arguments.pruner:
        pruners[name] = OCPruner.from_pretrained(folder)
        notes[name] = training_notes(folder)
    remedied = arguments.remedies or next(iter(pruners))
    if remedied not in pruners:
        raise SystemExit(f"--remedies {remedied} is none of the pruners {', '.join(pruners)}")
    layer = pruners[remedied].config.layer if arguments.layer is None else arguments.layer
    encoder = Encoder(arguments.encoder, layer)
    for name, pruner in pruners.items():
        if pruner.config.in_dim != encoder.width:
            raise SystemExit(f"{name} reads {pruner.config.in_dim} channels; the encoder has {encoder.width}")
    trained_on, held_out = split(find_photographs(arguments.photographs))
    layers = sorted({layer, *(pruner.config.layer for pruner in pruners.values())})
    seen = views(encoder, held_out, layers, arguments.size, arguments.crops)
    return {
        **provenance(None, arguments.commit),
        "encoder": encoder.name,
        "layer": layer,
        "photographs": {"trained_on": len(trained_on), "held_out": len(held_out)},
        "crops": len(seen),
        "tokens": seen.consumed.shape[1],
        "remedied": remedied,
        "pruners": {n: {"config": p.config.to_dict(), "training": notes[n]} for n, p in pruners.items()},
        "rows": [asdict(row) for row in all_rows(seen, layer, pruners, remedied)],
    }


def picture(rows: Sequence[Row], remedied: str) -> Figure:
    """Coverage error against random's, by budget."""
    lines: dict[str, tuple[str | None, str]] = {name: (None, name) for name in (RANDOM, *_DRAWN_RIVALS)}
    lines |= {f"pruner, {name}": (remedied, name) for name in ALWAYS}
    panels = []
    for what in ("read", "consumed"):
        by_chance = [_error(rows, None, RANDOM, percent, what) for percent in BUDGETS]
        points = {
            label: [
                (percent, 100 * (_error(rows, *line, percent, what) / chance - 1))
                for percent, chance in zip(BUDGETS, by_chance, strict=True)
            ]
            for label, line in lines.items()
        }
        panels.append(Panel(f"features {what}", points))
    return chart(panels, "tokens kept, %", "coverage error against random's, %", BUDGETS)


def _error(rows: Sequence[Row], pruner: str | None, method: str, percent: int, what: str) -> float:
    return float(getattr(find(rows, pruner, method, percent), f"coverage_{what}"))


def write(result: dict[str, Any], results: Path, document: Path, image: Path) -> None:
    """Record, tables inside the document, and the picture."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "evidence.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [Row(**row) for row in result["rows"]]
    text = replace_blocks(document.read_text(encoding="utf-8"), tables(rows, result["remedied"]))
    document.write_text(text, encoding="utf-8")
    picture(rows, result["remedied"]).savefig(image)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print tables; with ``--record`` also renew the document, its picture and the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of them")
    parser.add_argument("--training-part", type=Path, help="link those to train on into this folder, and end")
    parser.add_argument("--encoder", type=Path, help="folder of a vision encoder")
    parser.add_argument("--pruner", type=named, nargs="+", help="FOLDER or NAME=FOLDER of trained pruners")
    parser.add_argument("--remedies", help="the pruner on which remedies are tried; default: the first")
    parser.add_argument("--layer", type=int, help="whose features are 'read'; default: the first pruner's")
    parser.add_argument("--size", type=int, default=224, help="pixels; default: 224")
    parser.add_argument("--crops", type=int, default=4, help="of each photograph; default: 4")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--commit", help="of this tree, where git can't tell")
    parser.add_argument("--record", action="store_true", help="renew record, document and picture")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="default: bench/results")
    parser.add_argument("--document", type=Path, default=_DOCUMENT, help="default: docs/evidence.md")
    parser.add_argument("--picture", type=Path, default=_PICTURE, help="default: docs/evidence.png")
    arguments = parser.parse_args(argv)
    if arguments.training_part:
        count = gather(arguments.photographs, arguments.training_part)
        print(f"{count} photographs to train on are in {arguments.training_part}")
        return
    if not arguments.encoder or not arguments.pruner:
        parser.error("give --encoder and --pruner, or --training-part")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = run(arguments)
    rows = [Row(**row) for row in result["rows"]]
    for name, table in tables(rows, result["remedied"]).items():
        print(f"\n{name}\n\n{table}")
    if arguments.record:
        folder = arguments.results / device_slug(torch.device("cpu"))
        write(result, folder, arguments.document, arguments.picture)


if __name__ == "__main__":
    main()
