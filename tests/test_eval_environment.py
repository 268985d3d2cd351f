"""The folder that the plug-in's tests run with: filled once, from its lock file, or not and why. Offline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.environments import ROOT
from bench.eval_environment import __main__ as command
from bench.eval_environment import build
from tests.wheels import wheels_only, write_wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip installs from, and from nowhere else."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return wheels_only(tmp_path / "wheels", monkeypatch)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file of one small package."""
    path = tmp_path / "lock.txt"
    path.write_text("# Why.\nharness==1.0\n")
    monkeypatch.setattr(build, "LOCK", path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "eval"


def test_it_is_filled_once_and_tests_run_with_it(
    wheels: Path, lock: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "__version__ = '1.0'\n"
    write_wheel(wheels, "harness", "1.0", code, "Requires-Dist: unlisted\n")
    write_wheel(wheels, "unlisted", "1.0", "")
    test = tmp_path / "test_folder.py"
    test.write_text(
        "import os, harness, ocvtp\nfrom importlib.metadata import entry_points\n\n\ndef test_folder():\n"
        "    assert harness.__version__ == '1.0'\n"
        f"    assert ocvtp.__file__.startswith({str(ROOT)!r})\n"
        "    assert [os.environ[name] for name in ('HF_HUB_OFFLINE', 'OMP_NUM_THREADS')] == ['1', '1']\n"
        "    (found,) = entry_points(group='lmms_eval.models', name='ocvtp')\n"
        "    assert found.value == 'ocvtp.harness:manifests'\n"
    )
    alone = ["-n", "0", "--noconftest", "--rootdir", str(tmp_path), str(test)]
    assert command.main(["--folder", str(folder), "--", *alone]) == 0
    said = capfd.readouterr().out
    assert "installing into" in said
    assert "1 passed" in said
    assert not list(folder.glob("unlisted*"))
    assert command.main(["--folder", str(folder), "--", *alone, "-k", "nothing"]) == 1
    said = capfd.readouterr().out
    assert "installing into" not in said
    assert "1 deselected" in said


def test_no_torch_gets_in(wheels: Path, lock: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_wheel(wheels, "torch", "9.9", "")
    lock.write_text("torch==9.9\n")
    assert command.main(["--folder", str(folder)]) == 2
    assert "brought a torch of its own" in capfd.readouterr().out
    assert not folder.exists()


@pytest.mark.usefixtures("wheels", "lock")
def test_what_pip_can_not_have_is_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--folder", str(folder)]) == 2
    said = capfd.readouterr().out
    assert "pip could not install lmms-eval and its pinned dependencies" in said
    assert "No matching distribution found for harness==1.0" in said  # pip's own words
    assert not build.is_complete(folder)


class Processes:
    """Runs nothing; notes what it would have, and what fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[list[str]] = []
        self.code = 0
        self.makes: Path | None = None
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.ran.append(words)
        if self.makes is not None:
            self.makes.mkdir(exist_ok=True)
        return subprocess.CompletedProcess(words, self.code, "", "one\ntwo\nthree\nfour\n")

    @property
    def pips(self) -> int:
        return sum("pip" in words for words in self.ran)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Processes:
    made = Processes(monkeypatch)
    made.makes = folder
    return made


def test_another_lock_file_or_python_fills_it_anew(
    processes: Processes, lock: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build(folder)
    build.build(folder)
    assert processes.pips == 1
    (folder / "left_over.py").touch()
    lock.write_text("harness==2.0\n")
    assert not build.is_complete(folder)
    build.build(folder)
    assert not (folder / "left_over.py").exists()
    monkeypatch.setattr("sys.implementation.cache_tag", "cpython-399")
    assert not build.is_complete(folder)
    build.build(folder)
    assert processes.pips == 3


def test_a_build_that_was_cut_short_starts_over(processes: Processes, lock: Path, folder: Path) -> None:
    (folder / "harness").mkdir(parents=True)
    build.build(folder)
    assert not (folder / "harness").exists()
    assert build.is_complete(folder)


def test_a_changed_project_has_its_entry_points_written_again(
    processes: Processes, lock: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build(folder)
    project = tmp_path / "pyproject.toml"
    project.write_text("[project]\n")
    monkeypatch.setattr(build, "_PROJECT", project)
    processes.code = 1
    with pytest.raises(build.NoEnvironmentError, match=r"entry points could not(.|\n)*two\n  three\n  four"):
        build.build(folder)
    processes.code = 0
    build.build(folder)
    build.build(folder)
    assert ["egg_info" in words for words in processes.ran] == [False, True, True, True]


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (1, 1), (2, 1), (5, 1)])
def test_exit_code_is_pytests(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int
) -> None:
    monkeypatch.setattr(command, "build", lambda folder: None)
    processes.code = code
    assert command.main(["--", "-k", "resume"]) == exit_code
    assert command.main(["--", "tests/test_eval_environment.py", "-n", "0"]) == exit_code
    assert command.main(["--only-build"]) == 0
    parallel = ["-n", "auto", "--maxprocesses", "8"]
    assert [words[:3] for words in processes.ran] == [[sys.executable, "-m", "pytest"]] * 2
    assert [words[3:] for words in processes.ran] == [
        [*parallel, "tests/harness/lmms", "-k", "resume"],
        [*parallel, "tests/test_eval_environment.py", "-n", "0"],
    ]


def test_the_lock_pins_everything_but_what_is_the_environments() -> None:
    lines = [line for line in build.LOCK.read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!_-]+)", line) for line in lines]
    versions = {pin[1].lower(): pin[2] for pin in pins if pin}
    assert len(versions) == len(lines)
    assert versions["lmms-eval"].startswith("0.7.")
    assert int(versions["filelock"].split(".")[0]) < 4
    assert not {"torch", "torchvision", "transformers", "accelerate", "ocvtp", "latex2sympy2"} & set(versions)
