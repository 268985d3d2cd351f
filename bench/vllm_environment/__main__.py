"""Tests of serving, where vLLM is: ``python -m bench.vllm_environment [-- pytest's arguments]``.

The environment is ``build/vllm``, made from ``lock.txt`` if it is not there; delete it to make it anew.

Exits with 0 if the tests pass, or where the package index has no CPU build of vLLM, which it says; with 1 if
a test fails; with 2 if the environment could not be made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.environments import ROOT, NoEnvironmentError, chosen, split
from bench.vllm_environment.build import FOLDER, NoVllmError, build

TESTS = ("tests/serving",)


def pytest_command(python: Path, arguments: Sequence[str]) -> list[str]:
    """pytest on the tests of serving, or on those that ``arguments`` name."""
    return [str(python), "-m", "pytest", *chosen(arguments, TESTS)]


def environment() -> dict[str, str]:
    """Of the tests: nothing is looked up on the Hub, nothing reported, one thread for each engine."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    ours, pytests = split(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm_environment",
        description=__doc__,
        epilog="what follows -- goes to pytest",
    )
    parser.add_argument("--only-build", action="store_true", help="install, test nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args(ours)
    try:
        python = build(options.folder.resolve())
    except NoVllmError as error:
        print(f"serving is NOT TESTED: {error}")
        return 0
    except NoEnvironmentError as error:
        print(error)
        return 2
    if options.only_build:
        print(f"ready: {python}")
        return 0
    command = pytest_command(python, pytests)
    code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
