"""The matrix of transformers versions: what is built when, what runs, what the exit code says. Offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import matrix
from bench.environments import in_front
from tests.wheels import wheels_only, write_wheel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip installs from, and from nowhere else."""
    return wheels_only(tmp_path / "wheels", monkeypatch)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_has_kernels", lambda: False)


@pytest.fixture
def builds(tmp_path: Path) -> Path:
    return tmp_path / "builds"


def write_transformers(wheels: Path, version: str, requires: str = "") -> None:
    write_wheel(wheels, "transformers", version, f"__version__ = {version!r}\n", requires)


def write_test(folder: Path, body: str) -> str:
    path = folder / "test_version.py"
    path.write_text(f"import transformers\n\n\ndef test_version():\n    {body}\n")
    return str(path)


def run(builds: Path, versions: list[str], *pytest_arguments: str) -> int:
    # One process, and none of the project's own fixtures: they would cost seconds.
    extra = ["--", "-n", "0", "--noconftest", "--rootdir", str(builds.parent), *pytest_arguments]
    return matrix.main(["--versions", *versions, "--builds", str(builds), *extra])


def test_all_versions_that_count_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "installed", lambda: "5.23.0")
    assert matrix.versions() == ["5.0.0", "5.10.0", "5.17.0", "5.18.0", "5.23.0"]
    monkeypatch.setattr(matrix, "installed", lambda: "5.17.0")
    assert matrix.versions() == ["5.0.0", "5.10.0", "5.18.0", "5.17.0"]


def test_the_oldest_is_the_one_the_package_promises() -> None:
    assert f'"transformers>={matrix.OLDER[0].removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = matrix.pip_command("5.0.0", tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-3:] == ["--target", str(tmp_path), "transformers==5.0.0"]
    everything = matrix.pytest_command(["-k", "peft", ""])
    assert everything[:3] == [sys.executable, "-m", "pytest"]
    assert everything[-3 - len(matrix.TESTS) :] == [*matrix.TESTS, "-k", "peft", ""]
    for part in ("tests/vlm/conftest.py", "tests/test_matrix.py::test_commands"):
        assert matrix.pytest_command([part]).count("tests/vlm") == 0
    monkeypatch.setenv("PYTHONPATH", "mine")
    path = in_front(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path == [str(tmp_path), str(ROOT), str(ROOT / "kernels"), "mine"]
    monkeypatch.delenv("PYTHONPATH")
    assert in_front(None)["PYTHONPATH"].split(os.pathsep) == path[1:3]


def test_a_version_is_built_once_and_its_tests_run_on_it(
    wheels: Path, builds: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_transformers(wheels, "5.0.0", "Requires-Dist: needed\n")
    write_wheel(wheels, "needed", "1.0", "")
    test = write_test(
        wheels, "import needed; assert (transformers.__version__, needed.__name__)[0] == '5.0.0'"
    )
    assert run(builds, ["5.0.0"], test) == 0
    said = capfd.readouterr().out
    assert "installing" in said
    assert "transformers 5.0.0      ok       1 passed" in said
    assert matrix.main(["--list", "--versions", "5.0.0", "5.1.0", "--builds", str(builds)]) == 0
    assert capfd.readouterr().out.split("\n")[:2] == ["5.0.0      built", "5.1.0      to be built"]
    monkeypatch.setattr(matrix, "pip_command", lambda version, folder: ["false"])
    assert run(builds, ["5.0.0"], test) == 0
    assert "installing" not in capfd.readouterr().out


def test_a_build_that_was_cut_short_starts_over(wheels: Path, builds: Path) -> None:
    write_transformers(wheels, "5.0.0")
    folder = builds / "5.0.0"
    (folder / "transformers").mkdir(parents=True)
    (folder / "transformers" / "__init__.py").write_text("raise ImportError('half of it')")
    (folder / "left_over.py").touch()
    assert matrix.main(["--versions", "5.0.0", "--builds", str(builds), "--only-build"]) == 0
    assert not (folder / "left_over.py").exists()
    assert (folder / "transformers" / "__init__.py").read_text() == "__version__ = '5.0.0'\n"


def test_another_python_builds_its_own(wheels: Path, builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_transformers(wheels, "5.0.0")
    matrix.build("5.0.0", builds / "5.0.0")
    assert matrix.is_complete("5.0.0", builds / "5.0.0")
    monkeypatch.setattr("sys.implementation.cache_tag", "cpython-399")
    assert not matrix.is_complete("5.0.0", builds / "5.0.0")


def test_what_pip_can_not_have_is_said_and_the_rest_runs(
    wheels: Path, builds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_transformers(wheels, "5.1.0")
    test = write_test(wheels, "pass")
    assert run(builds, ["5.0.0", "5.1.0"], test) == 2
    said = capfd.readouterr().out
    assert "transformers 5.0.0      NOT RUN  pip could not install transformers==5.0.0" in said
    assert "PIP_FIND_LINKS" in said
    assert "No matching distribution" in said  # pip's own words
    assert "transformers 5.1.0      ok       1 passed" in said
    assert not matrix.is_complete("5.0.0", builds / "5.0.0")


def test_kernels_of_the_environment_get_a_fitting_version(
    wheels: Path, builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = 'Provides-Extra: hub-kernels\nRequires-Dist: kernels<0.11; extra == "hub-kernels"\n'
    write_transformers(wheels, "5.0.0", extra)
    for version in ("0.10.0", "0.17.0"):
        write_wheel(wheels, "kernels", version, "")
    folder = builds / "5.0.0"
    matrix.build("5.0.0", folder)
    assert not list(folder.glob("kernels*"))
    monkeypatch.setattr(matrix, "_has_kernels", lambda: True)
    matrix.build("5.0.0", folder)  # complete for an environment without, but not for this one
    assert (folder / "kernels-0.10.0.dist-info").is_dir()


def test_no_torch_gets_in(wheels: Path, builds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_transformers(wheels, "5.0.0", "Requires-Dist: torch\n")
    write_wheel(wheels, "torch", "9.9", "")
    assert run(builds, ["5.0.0"]) == 2
    assert "brought a torch of its own" in capfd.readouterr().out
    assert not (builds / "5.0.0").exists()


def test_a_folder_that_holds_another_version_is_not_tested(
    wheels: Path, builds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_wheel(wheels, "transformers", "5.0.0", "__version__ = '5.0.1'\n")
    assert run(builds, ["5.0.0"]) == 2
    said = capfd.readouterr().out
    assert "importing transformers 5.0.0 gave '5.0.1'" in said
    assert "delete" in said


def test_one_failure_fails_the_matrix(wheels: Path, builds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for version in ("5.0.0", "5.1.0"):
        write_transformers(wheels, version)
    test = write_test(wheels, "assert transformers.__version__ == '5.1.0'")
    assert run(builds, ["5.0.0", "5.1.0"], test) == 1
    said = capfd.readouterr().out
    assert "transformers 5.0.0      FAILED   1 failed" in said
    assert "transformers 5.1.0      ok       1 passed" in said
    assert run(builds, ["5.1.0"], test, "-k", "nothing") == 1  # tests that do not run have not passed
    assert "pytest exited with 5: 1 deselected" in capfd.readouterr().out


def test_the_environments_own_version_is_never_built(builds: Path, tmp_path: Path) -> None:
    test = write_test(tmp_path, f"assert transformers.__version__ == {matrix.installed()!r}")
    assert run(builds, [matrix.installed()], test) == 0
    assert not builds.exists()


def test_misuse_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.matrix", "--versions", "newest"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "'newest' is not a version of transformers" in result.stderr
