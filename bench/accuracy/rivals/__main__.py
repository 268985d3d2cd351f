"""Rival methods against tokens kept: ``python -m bench.accuracy.rivals``.

The questions of ``bench.accuracy``, its small model and its budgets; every method through ``ocvtp.apply``,
after checking that this harness says what ``model.generate`` says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accuracy import testset
from bench.accuracy.loading import ASSETS, MODEL, load_model, load_pruners
from bench.accuracy.rivals.asking import check, right_answers
from bench.accuracy.rivals.contenders import DEFAULT, EVERYTHING, Contender, contenders
from bench.accuracy.rivals.table import tables
from bench.accuracy.statistics import estimate
from bench.evidence.rows import BUDGETS, keep_of
from bench.harness import device_slug, provenance
from bench.markdown import replace_blocks
from bench.testbed.questions import KINDS
from ocvtp.atomic import write_json

_ROOT = Path(__file__).parents[3]
_DOCUMENT = _ROOT / "docs" / "accuracy.md"
_RECORD = "accuracy_rivals.json"
_GATE_PICTURES, _GATE_QUESTIONS, _GATE_KEEP = 6, 4, 28


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, measure; what a record holds.

    Raises:
        GateError: the product answers otherwise than the harness.
    """
    device = torch.device(arguments.device)
    model, processor = load_model(MODEL, device)
    folders = {"early": ASSETS / "testbed-pruner", "consumed": ASSETS / "testbed-pruner-consumed"}
    lines = contenders(load_pruners(folders, device))
    if arguments.only:
        lines = [one for one in lines if one.name in (EVERYTHING, DEFAULT) or arguments.only in one.name]
    words = processor.tokenizer.get_vocab()
    few = testset.build(model, words, "validation", _GATE_PICTURES, _GATE_QUESTIONS, [])
    checked = sum(check(model, processor, few, one, _GATE_KEEP) for one in lines)
    print(f"{checked} answers of the product and of this benchmark agree", flush=True)
    test = testset.build(model, words, "test", arguments.pictures, arguments.questions, [])
    tokens = test.tokens.shape[1]
    rows = []
    for percent in BUDGETS:
        keep = keep_of(percent, tokens)
        right: dict[str, np.ndarray] = {}
        for one in lines:
            if arguments.verbose:
                print(f"{time.strftime('%H:%M:%S')} {percent} %: {one.name}", flush=True)
            right[one.name] = right_answers(model, processor, test, one, keep).mean(0)
        rows += [_row(test, one, percent, keep, right) for one in lines]
    return {
        **provenance(device, arguments.commit),
        "gate": {"answers": checked},
        "set": {"split": "test", "pictures": len(test), "questions": len(test.kinds)},
        "tokens": tokens,
        "language_layers": model.config.text_config.num_hidden_layers,
        "rows": rows,
    }


def _row(
    test: testset.TestSet, one: Contender, percent: int, keep: int, right: dict[str, np.ndarray]
) -> dict[str, Any]:
    mine, picture = right[one.name], test.picture_of
    return {
        "method": one.name,
        "note": one.note,
        "percent": percent,
        "keep": keep,
        "seeds": one.seeds,
        "accuracy": list(estimate(mine, picture)),
        "over_default": list(estimate(mine - right[DEFAULT], picture)),
        "over_everything": list(estimate(mine - right[EVERYTHING], picture)),
        "kinds": {kind: float(mine[test.kinds == kind].mean()) for kind in KINDS},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table; with ``--record`` also renew the document and the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=int, default=500, help="default: 500")
    parser.add_argument("--questions", type=int, default=8, help="about each picture; default: 8")
    parser.add_argument("--only", help="lines whose name has this in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--commit", help="of this tree, where git can't tell")
    parser.add_argument("--verbose", action="store_true", help="say what is being measured")
    parser.add_argument("--record", action="store_true", help="renew record and document")
    parser.add_argument("--results", type=Path, default=_ROOT / "bench" / "results")
    parser.add_argument("--document", type=Path, default=_DOCUMENT, help="default: docs/accuracy.md")
    arguments = parser.parse_args(argv)
    if arguments.record and arguments.only:
        parser.error("--record is of all lines: leave out --only")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = run(arguments)
    made = tables(record)
    for markdown in made.values():
        print(f"\n{markdown}")
    if arguments.record:
        folder = arguments.results / device_slug(torch.device(arguments.device))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _RECORD, record)
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replace_blocks(text, made), encoding="utf-8")


if __name__ == "__main__":
    main()
