"""Train the small vision-language model: ``python -m bench.testbed --out RUN``.

Goes on where it stopped when started again with the same folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.testbed.recipe import Recipe
from bench.testbed.train import Run

_RECIPE = Path(__file__).with_name("recipe.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(prog="python -m bench.testbed", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--recipe", type=Path, default=_RECIPE, help="default: bench/testbed/recipe.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make pictures; default: 1")
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on later")
    arguments = parser.parse_args(argv)
    run = Run(Recipe.read(arguments.recipe), arguments.out, torch.device(arguments.device), arguments.workers)
    done = run.train(None if arguments.minutes is None else 60 * arguments.minutes)
    print("done" if done else "stopped: start again with the same folder to go on")


if __name__ == "__main__":
    main()
