"""`make gpu` on a machine without one: every command it would run exists and takes the options it is given.

What the commands do is rehearsed by the tests of each benchmark.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.e2e.presets import PRESETS
from bench.first.__main__ import main as first
from bench.serving.presets import PRESETS as SERVED

ROOT = Path(__file__).parents[1]
SERVING = ("serving", "gpu-serving")
MODULES = (
    "bench.e2e",
    "bench.scaling",
    "bench.tower",
    "bench.accuracy",
    "bench.testbed",
    "bench.serving",
    "bench.report",
)
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def commands() -> list[list[str]]:
    """Command lines of ``make gpu``, without what comes after ``||``."""
    made = subprocess.run(
        ["make", "-n", "gpu", "GPU_PYTHON=python3", "RESULTS=elsewhere", "COMMIT=abc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    joined = made.stdout.replace("\\\n", " ")
    lines = [line.partition("||")[0] for line in joined.splitlines() if " python3 -m " in line]
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture(scope="module")
def lines() -> list[list[str]]:
    return commands()


def of(lines: list[list[str]], module: str) -> list[list[str]]:
    return [line[3:] for line in lines if line[:3] == ["python3", "-m", module]]


def test_all_parts_are_there(lines: list[list[str]]) -> None:
    modules = {line[2] for line in lines}
    assert modules == {"pytest", *MODULES}
    presets = [line[line.index("--preset") + 1] for line in of(lines, "bench.e2e")]
    assert sorted(presets) == sorted(name for name, preset in PRESETS.items() if preset.gpu)
    (serving,) = of(lines, "bench.serving")
    assert SERVED[serving[serving.index("--preset") + 1]].gpu_bytes
    assert lines[-1][2] == "bench.report"
    recorded = [line for line in lines if "--record" in line]
    assert all("elsewhere" in line and "abc" in line for line in recorded)
    files = {path.name for path in (ROOT / "bench" / "micro").glob("test_*.py")}
    assert files <= {Path(word).name for line in of(lines, "pytest") for word in line}


@pytest.mark.parametrize("module", MODULES)
def test_commands_take_their_options(
    lines: list[list[str]],
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for line in of(lines, module):
        subcommand = [word for word in line[:1] if not word.startswith("-")]
        monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert {word for word in line if word.startswith("--")} <= known


def test_tests_and_microbenchmarks_take_theirs(lines: list[list[str]]) -> None:
    found = of(lines, "pytest")
    for line in found:
        for word in line:
            if word.endswith(".py") or word.startswith("tests/"):
                assert (ROOT / word).exists(), word
    options = [word for word in next(line for line in found if "--record" in line) if "/" not in word]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/micro/test_selection.py", "--collect-only", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def made(target: str, *variables: str, dry: bool = True) -> subprocess.CompletedProcess[str]:
    words = ["make", *(["-n"] if dry else []), target, *variables]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_first_minutes_take_their_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = made("gpu-first", "GPU_PYTHON=python3", "RESULTS=elsewhere", "COMMIT=abc", "STEPS=bits graphs")
    (line,) = [line for line in printed.stdout.splitlines() if " -m bench.first " in line]
    words = shlex.split(line.partition("-m bench.first")[2])
    assert words[:5] == ["--record", "--results", "elsewhere", "--commit", "abc"]
    assert words[5:] == ["--only", "bits", "--only", "graphs"]
    with pytest.raises(SystemExit) as stopped:
        first([*words, "--help"])
    assert stopped.value.code == 0
    assert "--only {capture,stream,right," in capsys.readouterr().out


def test_servers_run_in_the_python_that_has_vllm() -> None:
    """``SERVING_PYTHON`` where it is said; else build/vllm's, and on a GPU that of the other parts."""
    both = {target: made(target, "SERVING_PYTHON=py-v", "GPU_PYTHON=py-g").stdout for target in SERVING}
    assert all("py-v -m bench.serving" in printed for printed in both.values())
    assert "py-g -m bench.serving --preset" in made("gpu-serving", "GPU_PYTHON=py-g").stdout
    assert "--record" not in both["serving"]


def test_no_vllm_is_said_and_is_a_failure_of_its_own() -> None:
    """Without it ``make gpu-serving`` says how to get it; other parts are not kept from their turn."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("this Python has vLLM")
    printed = made("serving", f"SERVING_PYTHON={sys.executable}", dry=False)
    assert printed.returncode != 0
    assert "pip install vllm" in printed.stderr
    if not (ROOT / "build/vllm/bin/python").exists():
        printed = made("serving", dry=False)
        assert printed.returncode != 0
        assert "make test-serving builds build/vllm" in printed.stdout
