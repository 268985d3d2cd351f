"""The patch's tests on several versions of transformers: ``python -m bench.matrix``.

Each version but the installed one gets a folder under ``build/matrix`` which pip fills with it and what it
requires; the folder goes in front of the search path of this Python, so torch and everything else stay the
environment's and nothing in it changes. Folders are kept: delete one to build it anew.

Exits with 1 if a test fails on any version, with 2 if a version could not be had.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.environments import ROOT, NoEnvironmentError, chosen, fill, in_front, split
from bench.environments import is_complete as was_filled

#: The oldest supported; original positions; the last without and the first with ``mm_encoder_outputs``.
OLDER = ("5.0.0", "5.10.0", "5.17.0", "5.18.0")
TESTS = ("tests/vlm", "tests/testbed/test_assets.py", "tests/accuracy/test_smoke.py")
_COUNTS = re.compile(r"\d+ (passed|failed|error|skipped|deselected)|no tests ran")


@dataclass(frozen=True)
class Outcome:
    """What came of one version.

    Attributes:
        version: of transformers.
        code: 0 tests passed, 1 they did not, 2 they could not run.
        line: pytest's last words, or what went wrong.
    """

    version: str
    code: int
    line: str


def installed() -> str:
    """The version of transformers in the environment: the newest of the matrix."""
    return importlib.metadata.version("transformers")


def versions() -> list[str]:
    """All versions of the matrix, oldest first, the environment's last."""
    newest = installed()
    return [*(version for version in OLDER if version != newest), newest]


def requirement(version: str) -> str:
    """What pip is asked for.

    transformers imports Hugging Face's ``kernels`` where it finds it, and each version gets along with few of
    it: an environment that has one needs another. The extra was renamed in 5.x; pip ignores the unknown name.
    """
    return f"transformers[kernels,hub-kernels]=={version}" if _has_kernels() else f"transformers=={version}"


def is_complete(version: str, folder: Path) -> bool:
    """Whether ``folder`` was filled to the end, for this kind of Python and environment."""
    return was_filled(folder, _contents(version))


def build(version: str, folder: Path) -> None:
    """Fill ``folder`` with transformers ``version`` and what it requires, unless it is complete.

    Raises:
        NoEnvironmentError: pip could not, or brought a torch that would hide the environment's.
    """
    fill(folder, _contents(version), pip_command(version, folder), f"transformers=={version}")


def pip_command(version: str, folder: Path) -> list[str]:
    """What fills a folder. Without extras, transformers requires no torch."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [*pip, "--target", str(folder), requirement(version)]


def pytest_command(arguments: Sequence[str]) -> list[str]:
    """pytest on the patch's tests, or on those that ``arguments`` name; a later ``-n`` wins."""
    pytest = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8"]
    return [*pytest, *chosen(arguments, TESTS)]


def prepare(version: str, builds: Path) -> Path | None:
    """The folder of ``version``, complete and checked; None for the environment's own.

    Raises:
        NoEnvironmentError: see :func:`build`; or Python does not find that version there.
    """
    folder = None if version == installed() else builds / version
    if folder:
        build(version, folder)
    code = "import transformers; print(transformers.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=in_front(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode or found.stdout.strip() != version:
        said = found.stdout.strip() or found.stderr.strip()
        where = f"delete {folder} and try again" if folder else "the environment is broken"
        raise NoEnvironmentError(f"importing transformers {version} gave {said[-300:]!r}: {where}")
    return folder


def run_tests(version: str, folder: Path | None, arguments: Sequence[str]) -> Outcome:
    """Run the tests on one version, their output passed on as it comes."""
    start, last = time.monotonic(), "no output"
    with subprocess.Popen(
        pytest_command(arguments),
        cwd=ROOT,
        env=in_front(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if _COUNTS.search(line):
                last = line.strip(" =\n")
    code = process.returncode
    if code not in (0, 1):  # interrupted, misused, or nothing collected
        last = f"pytest exited with {code}: {last}"
    return Outcome(version, int(code != 0), f"{last} ({time.monotonic() - start:.0f} s in all)")


def run_version(version: str, builds: Path, arguments: Sequence[str] | None) -> Outcome:
    """Build one version and test it; without ``arguments`` only build it."""
    try:
        folder = prepare(version, builds)
    except NoEnvironmentError as error:
        return Outcome(version, 2, str(error))
    if arguments is None:
        return Outcome(version, 0, f"ready: {folder or 'the environment'}")
    print(f"transformers {version}: {' '.join(pytest_command(arguments)[1:])}", flush=True)
    return run_tests(version, folder, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    ours, pytests = split(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench.matrix", description=__doc__, epilog="what follows -- goes to pytest"
    )
    parser.add_argument("--versions", nargs="+", metavar="X.Y.Z", help="default: all that --list shows")
    parser.add_argument("--only-build", action="store_true", help="install, test nothing")
    parser.add_argument("--list", action="store_true", help="show versions and whether they are there")
    parser.add_argument("--builds", type=Path, default=ROOT / "build" / "matrix", help="default: %(default)s")
    options = parser.parse_args(ours)
    wanted = list(dict.fromkeys(options.versions or versions()))
    for version in wanted:
        if not re.fullmatch(r"\d+\.\d+\.\d+\w*", version):
            parser.error(f"{version!r} is not a version of transformers, such as {OLDER[0]}")
    if options.list:
        for version in wanted:
            print(f"{version:10} {_state(version, options.builds)}")
        return 0
    tests = None if options.only_build else pytests
    outcomes = [run_version(version, options.builds.resolve(), tests) for version in wanted]
    print("\n".join(["", *(_line(outcome) for outcome in outcomes)]))
    return max(outcome.code for outcome in outcomes)


def _state(version: str, builds: Path) -> str:
    if version == installed():
        return "the environment's"
    return "built" if is_complete(version, builds / version) else "to be built"


def _line(outcome: Outcome) -> str:
    word = ("ok", "FAILED", "NOT RUN")[outcome.code]
    return f"transformers {outcome.version:10} {word:8} {outcome.line}"


def _contents(version: str) -> str:
    return f"{requirement(version)} {sysconfig.get_platform()} {sys.implementation.cache_tag}"


def _has_kernels() -> bool:
    return any(importlib.metadata.distributions(name="kernels"))


if __name__ == "__main__":
    sys.exit(main())
