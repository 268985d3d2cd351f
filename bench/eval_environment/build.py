"""Fills a folder from the lock file beside this one: lmms-eval, and what it needs beside torch."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from bench.environments import ROOT, NoEnvironmentError, digest, fill, last_words, say, says
from bench.environments import is_complete as was_filled

FOLDER = ROOT / "build" / "eval"
LOCK = Path(__file__).with_name("lock.txt")
_PROJECT = ROOT / "pyproject.toml"


def is_complete(folder: Path = FOLDER) -> bool:
    """Whether ``folder`` was filled to the end, from this lock file and for this kind of Python."""
    return was_filled(folder, _contents())


def build(folder: Path = FOLDER) -> None:
    """Fill ``folder``, as far as it is not.

    Raises:
        NoEnvironmentError: pip could not, or brought a torch; or our entry points could not be written down.
    """
    fill(folder, _contents(), pip_command(folder), "lmms-eval and its pinned dependencies")
    marker = folder / ".ocvtp"
    if not says(marker, digest(_PROJECT)):
        # lmms-eval finds the plug-in by its entry point, and of a package that is there twice, the first
        # counts: an install of ocvtp that is older than pyproject.toml must not hide it.
        _write_entry_points(folder)
        say(marker, digest(_PROJECT))


def pip_command(folder: Path) -> list[str]:
    """What fills it. The lock file is the whole list: nothing comes with what is on it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [*pip, "--no-deps", "--target", str(folder), "-r", str(LOCK)]


def _write_entry_points(folder: Path) -> None:
    code = "import setuptools; setuptools.setup()"
    command = [sys.executable, "-c", code, "--quiet", "egg_info", "--egg-base", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode:
        raise NoEnvironmentError(
            f"ocvtp's entry points could not be written to {folder}. The last words:\n"
            f"{last_words(result.stderr)}"
        )


def _contents() -> str:
    return f"{digest(LOCK)} {sysconfig.get_platform()} {sys.implementation.cache_tag}"
