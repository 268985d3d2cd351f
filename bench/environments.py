"""What the environments of our tests share: folders that pip fills once, and arguments that are pytest's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


class NoEnvironmentError(RuntimeError):
    """An environment could not be made; the message says why, or what to do."""


def is_complete(folder: Path, contents: str) -> bool:
    """Whether ``folder`` was made to the end, and of these ``contents``."""
    return says(folder / ".complete", contents)


def fill(folder: Path, contents: str, command: Sequence[str], what: str) -> bool:
    """Make ``folder`` anew by ``command``, a pip that installs into it, unless it is complete.

    Args:
        folder: what stood in it, of other contents or cut short, is removed.
        contents: all that decides what it gets.
        command: the process.
        what: the words for it in what is said.

    Returns:
        Whether it had to be.

    Raises:
        NoEnvironmentError: pip could not, or brought a torch that would hide the environment's.
    """
    if is_complete(folder, contents):
        return False
    if folder.exists():
        shutil.rmtree(folder)
    print(f"{what}: installing into {folder} ...", flush=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode:
        raise NoEnvironmentError(
            f"pip could not install {what}. It needs a package registry, or a folder of wheels "
            f"(PIP_NO_INDEX=1 PIP_FIND_LINKS=folder). pip's last words:\n{last_words(result.stderr)}"
        )
    if (folder / "torch").exists():
        shutil.rmtree(folder)
        raise NoEnvironmentError(f"{what} brought a torch of its own, so its folder was removed")
    say(folder / ".complete", contents)
    return True


def last_words(said: str) -> str:
    """The last three lines of what a process said, indented."""
    return "\n".join(f"  {line}" for line in said.strip().splitlines()[-3:])


def says(marker: Path, contents: str) -> bool:
    """Whether ``marker`` was left by :func:`say` with the same ``contents``."""
    return marker.is_file() and marker.read_text() == contents


def say(marker: Path, contents: str) -> None:
    """Leave ``marker``: what it stands for was done to the end."""
    marker.write_text(contents)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_front(folder: Path | None) -> dict[str, str]:
    """This process's environment, in which ``folder``, if any, and this checkout hide what is installed."""
    path = [*([str(folder)] if folder else []), str(ROOT), str(ROOT / "kernels")]
    if os.environ.get("PYTHONPATH"):
        path.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's own arguments, and those after ``--``, which are pytest's."""
    at = given.index("--") if "--" in given else len(given)
    return list(given[:at]), list(given[at + 1 :])


def chosen(arguments: Sequence[str], tests: Sequence[str]) -> list[str]:
    """``arguments`` of pytest, after ``tests`` unless they name some themselves."""
    named = any((ROOT / argument.split("::")[0]).exists() for argument in arguments if argument)
    return [*(() if named else tests), *arguments]
