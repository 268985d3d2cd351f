"""A small vision-language model, from nothing to what is shipped: ``python -m bench.testbed COMMAND``.

train      train it; goes on where it stopped when started again with the same folder
           (several processes: torchrun --standalone --nproc-per-node 2 -m bench.testbed train ...)
pictures   write scenes as PNG files, for ocvtp features
ship       from a finished run and trained pruners to assets/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.testbed import export
from bench.testbed.recipe import Recipe
from bench.testbed.train import Run

_HERE = Path(__file__).parent


def _train(arguments: argparse.Namespace) -> None:
    recipe, device = Recipe.read(arguments.recipe), torch.device(arguments.device)
    run = Run(recipe, arguments.out, device, arguments.workers, arguments.commit)
    done = run.train(None if arguments.minutes is None else 60 * arguments.minutes)
    if run.first:
        print("done" if done else "stopped: start again with the same folder to go on")


def _pictures(arguments: argparse.Namespace) -> None:
    export.pictures(arguments.split, arguments.count, arguments.out)


def _ship(arguments: argparse.Namespace) -> None:
    if arguments.run:
        export.export(arguments.run, arguments.assets / "testbed")
        export.scenes(arguments.assets / "scenes")
    for name, runs in (
        ("testbed-pruner", arguments.pruner),
        ("testbed-pruner-consumed", arguments.consumed_pruner),
    ):
        for number, run in enumerate(runs or ()):
            export.copy_pruner(run, arguments.assets / (name + (f"-{number}" if number else "")))
    export.write_sums(arguments.assets)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.testbed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train the model, or go on")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--recipe", type=Path, default=_HERE / "recipe.json", help="default: %(default)s")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--workers", type=int, default=1, help="processes that make pictures; default: 1")
    train.add_argument("--commit", help="of this tree, where git can't tell")
    train.add_argument("--minutes", type=float, help="stop after so many, to go on later")
    train.set_defaults(run_command=_train)
    pictures = commands.add_parser("pictures", help="write scenes as PNG files")
    pictures.add_argument("--out", type=Path, required=True)
    pictures.add_argument("--count", type=int, default=2000)
    pictures.add_argument("--split", default="train", choices=("train", "validation", "test", "unseen"))
    pictures.set_defaults(run_command=_pictures)
    ship = commands.add_parser("ship", help="write assets")
    ship.add_argument("--run", type=Path, help="a finished run of train")
    ship.add_argument("--pruner", type=Path, nargs="+", help="runs of ocvtp train, the shipped one first")
    ship.add_argument(
        "--consumed-pruner", type=Path, nargs="+", help="the same of pruners of the consumed layer"
    )
    ship.add_argument("--assets", type=Path, default=export.ASSETS, help="default: assets")
    ship.set_defaults(run_command=_ship)
    arguments = parser.parse_args(argv)
    arguments.run_command(arguments)


if __name__ == "__main__":
    main()
