"""Accuracy against tokens kept: ``python -m bench.accuracy``.

Answers generated questions with the small vision-language model of ``assets/testbed``, with every selector
and budget, after checking that the product gives the same answers as this harness.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import gate, measure, testset
from bench.accuracy.answers import correct
from bench.accuracy.blind import Blind
from bench.accuracy.cases import cases
from bench.accuracy.guess import guessed
from bench.accuracy.loading import ASSETS, MODEL, load_model, load_pruners
from bench.accuracy.relation import relations
from bench.accuracy.report import picture, tables
from bench.accuracy.selectors import ours, ours_consumed, rivals
from bench.harness import device_slug, provenance
from bench.markdown import replace_blocks
from bench.pruners import named, training_notes
from bench.testbed.examples import Split
from ocvtp.atomic import write_json

_ROOT = Path(__file__).parents[2]
_DOCUMENT = _ROOT / "docs" / "accuracy.md"
_PICTURE = _ROOT / "docs" / "accuracy.png"
_RESULTS = _ROOT / "bench" / "results"
_RECORD = "accuracy.json"
_SPLITS: tuple[Split, ...] = ("test", "unseen")
_GATE_PICTURES, _GATE_QUESTIONS = 6, 4


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, measure; what a record holds.

    Raises:
        GateError: the product answers otherwise than the harness.
        SystemExit: pruners of other layers than they should be.
    """
    device = torch.device(arguments.device)
    model, processor = load_model(arguments.model, device)
    early, late = (load_pruners(dict(each), device) for each in (arguments.pruner, arguments.consumed_pruner))
    consumed = testset.consumed_layer(model)
    layers = {pruner.config.layer for pruner in early.values()}
    if len(layers) != 1:
        raise SystemExit(f"all of --pruner must read the same layer; these read {sorted(layers)}")
    if others := {pruner.config.layer for pruner in late.values()} - {consumed}:
        raise SystemExit(
            f"--consumed-pruner must read layer {consumed}, as the projector does; "
            f"these read {sorted(others)}"
        )
    layer = layers.pop()
    selectors = [*rivals(layer), *ours(early), *ours_consumed(late)]
    words = processor.tokenizer.get_vocab()
    few = testset.build(model, words, "validation", _GATE_PICTURES, _GATE_QUESTIONS, [layer])
    checked = gate.check(model, processor, few, cases(few, selectors, layer))
    print(f"{checked} answers of the product and of this benchmark agree", flush=True)
    if arguments.blind is None:
        blind = Blind.of_record(_folder(arguments) / _RECORD)
    else:
        blind = Blind(load_model(arguments.blind, device)[0])
    rows: list[measure.Row] = []
    sets = {}
    for split in _SPLITS:
        test = testset.build(model, words, split, arguments.pictures, arguments.questions, [layer])
        sets[split] = {"pictures": len(test), "questions": len(test.kinds)}
        everything = correct(model, test)
        rows.append(measure.plain_row(test, measure.UNPRUNED, everything))
        rows.append(measure.plain_row(test, measure.GUESSED, guessed(test)))
        rows += blind.rows(test)
        another = correct(model, test, test.projected.roll(1, 0))
        rows.append(measure.plain_row(test, measure.OTHER, another))
        say = _say if arguments.verbose else None
        rows += measure.rows(model, test, selectors, layer, everything, say)
    return {
        **provenance(device, arguments.commit),
        "gate": {"answers": checked},
        "blind": blind.source,
        "sets": sets,
        "layer": layer,
        "consumed": consumed,
        "tokens": model.config.image_seq_length,
        "pruners": {name: training_notes(path) for name, path in arguments.pruner},
        "consumed_pruners": {name: training_notes(path) for name, path in arguments.consumed_pruner},
        "rows": [row.to_dict() for row in rows],
        "relations": [
            measure.without_nan(asdict(r))
            for r in relations([r for r in rows if r.split == "test" and r.percent < 100])
        ],
    }


def _folder(arguments: argparse.Namespace) -> Path:
    """Of this device's records."""
    folder: Path = arguments.results / device_slug(torch.device(arguments.device))
    return folder


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def renew(record: dict[str, Any], document: Path, image: Path) -> None:
    """Tables inside the document, and its picture."""
    document.write_text(
        replace_blocks(document.read_text(encoding="utf-8"), tables(record)), encoding="utf-8"
    )
    picture(record).savefig(image)


def _named(text: str) -> tuple[str, Path]:
    """As :func:`bench.pruners.named`, but a run's pruner is called by the run: all runs call theirs alike."""
    name, folder = named(text)
    unnamed_run = "=" not in text and name == "pruner"
    return (folder.resolve().parent.name if unnamed_run else name), folder


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print tables; with ``--record`` also renew the document, its picture and the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="default: assets/testbed")
    for option, name, how in (
        ("--pruner", "testbed-pruner", "FOLDER or NAME=FOLDER, of one early layer; default: the shipped"),
        ("--consumed-pruner", "testbed-pruner-consumed", "the same of the layer that the projector reads"),
    ):
        shipped = [("seed 0", ASSETS / name), ("seed 1", ASSETS / f"{name}-1")]
        parser.add_argument(option, type=_named, nargs="+", default=shipped, help=how)
    parser.add_argument(
        "--blind", type=Path, help="folder of a model trained without pictures; default: as last recorded"
    )
    parser.add_argument("--pictures", type=int, default=500, help="of each split; default: 500")
    parser.add_argument("--questions", type=int, default=8, help="about each picture; default: 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--commit", help="of this tree, where git can't tell")
    parser.add_argument("--verbose", action="store_true", help="say what is being measured")
    parser.add_argument("--record", action="store_true", help="renew record, document and picture")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="default: bench/results")
    parser.add_argument("--document", type=Path, default=_DOCUMENT, help="default: docs/accuracy.md")
    parser.add_argument("--no-document", dest="document", action="store_const", const=None, help="leave it")
    parser.add_argument("--picture", type=Path, default=_PICTURE, help="default: docs/accuracy.png")
    arguments = parser.parse_args(argv)
    for pruners in (arguments.pruner, arguments.consumed_pruner):
        names = [name for name, _ in pruners]
        if len(set(names)) < len(names):
            parser.error(f"two pruners have one name ({', '.join(names)}): say NAME=FOLDER NAME=FOLDER")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = run(arguments)
    for name, markdown in tables(record).items():
        print(f"\n{name}\n\n{markdown}")
    if arguments.record:
        _folder(arguments).mkdir(parents=True, exist_ok=True)
        write_json(_folder(arguments) / _RECORD, record)
    if arguments.record and arguments.document:
        renew(record, arguments.document, arguments.picture)


if __name__ == "__main__":
    main()
