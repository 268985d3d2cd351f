"""Tests of the plug-in, where lmms-eval is: ``python -m bench.eval_environment [-- pytest's arguments]``.

The folder is ``build/eval``, filled from ``lock.txt`` if it is not; delete it to fill it anew. It goes in
front of the search path of this Python, so torch and transformers stay the environment's and nothing in it
changes.

Exits with 1 if a test fails or none runs, with 2 if the folder could not be filled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.environments import ROOT, NoEnvironmentError, chosen, in_front, split
from bench.eval_environment.build import FOLDER, build

TESTS = ("tests/harness/lmms",)


def pytest_command(arguments: Sequence[str]) -> list[str]:
    """pytest on the plug-in's tests, or on those that ``arguments`` name; a later ``-n`` wins."""
    pytest = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8"]
    return [*pytest, *chosen(arguments, TESTS)]


def environment(folder: Path) -> dict[str, str]:
    """Of the tests: nothing is looked up on the Hub, one thread for each process."""
    return {**in_front(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    ours, pytests = split(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench.eval_environment", description=__doc__, epilog="what follows -- goes to pytest"
    )
    parser.add_argument("--only-build", action="store_true", help="install, test nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args(ours)
    folder = options.folder.resolve()
    try:
        build(folder)
    except NoEnvironmentError as error:
        print(error)
        return 2
    if options.only_build:
        print(f"ready: {folder}")
        return 0
    command = pytest_command(pytests)
    code = subprocess.run(command, cwd=ROOT, env=environment(folder), check=False).returncode
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
