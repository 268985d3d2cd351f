"""The first minutes on a GPU, rehearsed without one: budget, processes, file, page, and every check."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.first.__main__ import main
from bench.first.budget import Budget
from bench.first.checks.__main__ import CHECKS
from bench.first.checks.setting import tiny
from bench.first.plan import STEPS, Step
from bench.first.report import Report, page, said
from bench.first.run import MARK, run
from ocvtp_kernels._arch import interpreting

ROOT = Path(__file__).parents[2]


def test_budget() -> None:
    now = [100.0]
    budget = Budget(60, clock=lambda: now[0])
    assert budget.allow(limit=40, least=10) == 40
    assert budget.allow(limit=40, least=10, later=[15, 20]) == 25  # those behind get theirs
    assert budget.allow(limit=40, least=10, later=[15, 70, 20]) == 25  # but for one that no longer fits
    now[0] += 30
    assert budget.allow(limit=40, least=10) == 30
    now[0] += 25
    assert budget.allow(limit=40, least=10) is None
    now[0] += 25
    assert budget.left == 0


def finding(**what: object) -> str:
    return f"print({MARK + json.dumps(what)!r}, flush=True)\n"


def ran(code: str, seconds: float = 20.0) -> tuple[dict, list]:
    found: list = []
    result = run([sys.executable, "-c", code], seconds, {"OCVTP_SAID": "yes"}, found.append, ROOT)
    return result, found


def test_a_step_that_works() -> None:
    code = finding(what="a", us=1.5) + "import os; print(os.environ['OCVTP_SAID'])\n" + finding(what="b")
    result, found = ran(code)
    assert found == [{"what": "a", "us": 1.5}, {"what": "b"}]
    assert (result["outcome"], result["code"], result["said"]) == ("done", 0, ["yes"])


def test_a_step_that_fails_keeps_what_it_found() -> None:
    result, found = ran(finding(what="a") + f"print({MARK + '{cut off'!r})\nraise ValueError('no')")
    assert found == [{"what": "a"}]
    assert result["outcome"] == "failed"
    assert result["said"][-1] == "ValueError: no"


def test_a_step_that_hangs_is_killed_with_its_children() -> None:
    child = f"import time; time.sleep(1); {finding(what='late').strip()}; time.sleep(60)"
    code = (
        f"import subprocess, sys, time\n{finding(what='a')}subprocess.run([sys.executable, '-c', {child!r}])"
    )
    start = time.monotonic()
    result, found = ran(code, seconds=0.8)
    assert time.monotonic() - start < 20
    assert result["outcome"] == "out of time"
    assert found in ([{"what": "a"}], [])  # a slow machine may take longer to begin


def test_a_step_whose_child_outlives_it_is_over() -> None:
    """The child holds the pipe open."""
    child = "import time; time.sleep(60)"
    start = time.monotonic()
    result, _ = ran(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])")
    assert result["outcome"] == "done"
    assert time.monotonic() - start < 15


def test_tests_are_tallied() -> None:
    lines = [
        "[gw0] PASSED tests/a.py::one ",
        "tests/a.py::two FAILED                       [ 50%]",
        "FAILED tests/a.py::two - AssertionError",
        "tests/a.py::three SKIPPED (needs a CUDA GPU)",
    ]
    result, _ = ran("\n".join(f"print({line!r})" for line in lines) + "\nraise SystemExit(1)")
    assert result["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert [line.split()[0] for line in result["failed"]] == ["tests/a.py::two"]


@dataclass(frozen=True)
class Fake(Step):
    """A step whose process runs ``check`` as it is."""

    def command(self, device: str, tiny: bool) -> list[str]:
        return [sys.executable, "-c", self.check] if self.check else ["/no/such/program"]


def test_all_steps_get_their_turn_and_the_file_is_written_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One works, one raises, one hangs, one sees the first one's findings on disk; one isn't there."""
    seen = (
        "import json, pathlib\n"
        f"(path,) = pathlib.Path({str(tmp_path)!r}).glob('*/first.json')\n"
        "data = json.loads(path.read_text())['steps']\n"
        f"print({MARK!r} + json.dumps({{'what': 'seen', 'of': data['works']['findings'], "
        "'now': data['sees']['outcome']}))"
    )
    steps = [
        Fake("works", "does it?", "all", 20, 0, check=finding(what="a figure", us=2.5, right=True)),
        Fake("raises", "does it raise?", "little", 20, 0, check=finding(what="b") + "raise ValueError('no')"),
        Fake("hangs", "does it hang?", "little", 0.5, 0, check="import time; time.sleep(60)"),
        Fake("sees", "is it there?", "little", 20, 0, check=seen),
        Fake("missing", "is it there?", "little", 20, 0),
        Fake("late", "is there time?", "little", 9999, 500, check="print('never')"),
    ]
    options = ["--device", "cpu", "--record", "--results", str(tmp_path), "--commit", "abc", "--minutes", "2"]
    assert main(options, steps) == 1
    (path,) = tmp_path.glob("*/first.json")
    data = json.loads(path.read_text())
    outcomes = {name: one["outcome"] for name, one in data["steps"].items()}
    assert outcomes == {
        "works": "done",
        "raises": "failed",
        "hangs": "out of time",
        "sees": "done",
        "missing": "failed",
        "late": "not started",
    }
    assert data["commit"] == "abc"
    (found,) = data["steps"]["sees"]["findings"]
    assert found["of"] == [{"what": "a figure", "us": 2.5, "right": True}]
    assert found["now"] == "not finished"
    printed = capsys.readouterr().out
    assert "works: does it? [done" in printed
    assert "    a figure: us 2.5, right yes" in printed
    assert "ValueError: no" in printed
    assert "[out of time" in printed
    assert "it needs 500 s" in printed
    assert printed.count("decides: ") == 6
    assert main([*options, "--only", "works"], steps) == 0


def test_a_file_says_what_was_not_finished(tmp_path: Path) -> None:
    step = STEPS[0]
    report = Report(tmp_path / "some" / "first.json", {"device": "H200", "commit": "abc"})
    report.begin(step)
    data = json.loads(report.path.read_text())
    assert data["steps"][step.name]["outcome"] == "not finished"
    text = page(data, STEPS)
    assert "H200, abc" in text
    assert f"{step.name}: {step.question} [not finished]" in text
    assert text.count("[not started]") == len(STEPS) - 1
    assert said({"what": "x", "same bits": False, "us": [1.0, 2.0]}) == "x: same bits NO, us 1 / 2"


def test_the_plan() -> None:
    assert sum(step.least for step in STEPS) < 7.5 * 60
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert {step.check for step in STEPS if step.check} == set(CHECKS)
    for step in STEPS:
        assert bool(step.tests) != bool(step.check)
        assert step.least <= step.limit
        assert all((ROOT / test).is_file() for test in step.tests)


@pytest.mark.thorough
def test_pytest_takes_the_options_and_leaves_tiles_out() -> None:
    step = next(step for step in STEPS if step.tests and step.name == "right")
    command = step.command("cpu", False)
    options = [word for word in command[3:] if word not in step.tests]
    if "-n" in options:  # collects in its workers, which print nothing
        options = options[4:]
    path = "tests/kernels/test_slot_attention_triton.py"
    collected = [*command[:3], path, *options, "--collect-only", "-k", "order_of_tiles or autocast"]
    printed = subprocess.run(collected, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "test_autocast_does_not_matter" in printed
    assert "test_order_of_tiles" not in printed


@pytest.mark.skipif(not interpreting(), reason="a rehearsal")
@pytest.mark.parametrize("name", CHECKS)
def test_every_check_at_tiny_sizes(name: str) -> None:
    """All of it runs, and everything that is right or wrong, not fast or slow, is right."""
    check = getattr(importlib.import_module(f"bench.first.checks.{name}"), name)
    found = list(check(tiny(torch.device("cpu"))))
    assert found
    for one in found:
        json.dumps(one)
        assert one["what"]
        assert not any(key in one for key in ("can't run", "can't be captured", "because")), one
        for key, value in one.items():
            if isinstance(value, bool) and key != "this device has them":
                assert value, one
            if isinstance(value, float):
                assert math.isfinite(value), one
