"""A run that was killed goes on, and says at the end what an undisturbed one says."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-eval")

from PIL import Image

from bench.accuracy.loading import ASSETS, MODEL
from ocvtp.harness.model import Ocvtp
from tests.harness.lmms.asking import ocvtp_model
from tests.harness.lmms.conftest import Runs
from tests.harness.lmms.processes import lmms_eval, results, samples, words

PRUNER = ASSETS / "testbed-pruner"
MODEL_ARGS: dict[str, object] = {"pretrained": MODEL, "dtype": "float32", "pruner": PRUNER, "keep": 28}
#: Kills its process in the middle of writing its third batch.
KILLED = """
import json, os, signal
from ocvtp.harness.journal import Journal
real, calls = Journal.add, []
def add(self, rank, answers):
    calls.append(0)
    if len(calls) < 3:
        return real(self, rank, answers)
    self._file.write(json.dumps({"answers": [{"key": key, **one} for key, one in answers]}).encode()[:150])
    self._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
Journal.add = add
"""
LIMIT = 14


def said(arguments: dict[str, object]) -> str:
    return ",".join(f"{name}={value}" for name, value in arguments.items() if name != "dtype")


def test_a_killed_run_goes_on(testbed: Path, run: Runs, tmp_path: Path) -> None:
    resume = tmp_path / "answers"
    given = {**MODEL_ARGS, "resume": resume}
    killed = lmms_eval(words(testbed, tmp_path / "out", given, limit=LIMIT), tmp_path, before=KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list(tmp_path.rglob("*_results.json"))
    assert not (resume / "0.jsonl").read_bytes().endswith(b"\n")

    resumed = run(said(given), ["ocvtp_testbed"], 4, limit=LIMIT)
    undisturbed = run(said(MODEL_ARGS), ["ocvtp_testbed"], 4, limit=LIMIT)
    task = "ocvtp_testbed"
    assert resumed.answers(task) == undisturbed.answers(task)
    assert resumed.counts(task) == undisturbed.counts(task)
    assert resumed.found["results"] == undisturbed.found["results"]
    measured, plain = resumed.record["measured"], undisturbed.record["measured"]
    assert (measured["restored"], plain["restored"]) == (8, 0)
    for name in ("requests", "images", "output_tokens", "kept_vision_tokens_per_image"):
        assert measured[name] == plain[name]
    assert measured["seconds_per_image"] > 0

    again = run(said(given), [task], 1, limit=LIMIT)  # another batch size may go on
    assert again.record["measured"]["restored"] == LIMIT
    assert again.answers(task) == undisturbed.answers(task)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"keep": 29}, r"settings\.keep"),
        ({"pruner": ASSETS / "testbed-pruner-1"}, "pruner"),
        ({"system_prompt": "Be brief."}, r"settings\.system_prompt"),
        ({"merge": "off"}, r"settings\.merge"),
    ],
)
def test_answers_under_other_settings_are_refused(
    changed: dict[str, object], named: str, run: Runs, tmp_path: Path
) -> None:
    given = {**MODEL_ARGS, "resume": tmp_path / "answers"}
    run(said(given), ["ocvtp_testbed"], 4, limit=4)
    with pytest.raises(ValueError, match=rf"other settings \(.*{named}"):
        ocvtp_model(said({**given, **changed}))


def test_answers_of_other_versions_are_refused(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = said({**MODEL_ARGS, "resume": tmp_path / "answers"})
    run(given, ["ocvtp_testbed"], 4, limit=4)
    monkeypatch.setattr("ocvtp.harness.record.__version__", "99")
    with pytest.raises(ValueError, match=r"versions\.ocvtp"):
        ocvtp_model(given)


def test_answers_about_other_pictures_are_refused(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = said({**MODEL_ARGS, "resume": tmp_path / "answers"})
    run(given, ["ocvtp_testbed"], 4, limit=6)
    real = Ocvtp._conversation

    def mirrored(self: Ocvtp, request: Any) -> Any:
        talk = real(self, request)
        for part in talk[0]["content"]:
            if part["type"] == "image":
                part["image"] = part["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return talk

    monkeypatch.setattr(Ocvtp, "_conversation", mirrored)
    with pytest.raises(ValueError, match="the questions of ocvtp_testbed, words or pictures, are not those"):
        run(given, ["ocvtp_testbed"], 4, limit=6)


def test_drawn_answers_are_not_resumed(run: Runs, tmp_path: Path) -> None:
    drawn = {"gen_kwargs": "temperature=0.7,do_sample=True,max_new_tokens=1", "limit": 4}
    run(said(MODEL_ARGS), ["ocvtp_testbed"], 4, **drawn)
    with pytest.raises(ValueError, match="ocvtp_testbed draws its answers"):
        run(said({**MODEL_ARGS, "resume": tmp_path / "answers"}), ["ocvtp_testbed"], 4, **drawn)


def test_seconds_of_another_batch_size_are_left_out(run: Runs, tmp_path: Path) -> None:
    given = said({**MODEL_ARGS, "resume": tmp_path / "answers"})
    first = run(given, ["ocvtp_testbed"], 4, limit=8).record["measured"]
    assert first["seconds_per_image"] > 0
    again = run(given, ["ocvtp_testbed"], 2, limit=8).record["measured"]
    assert (again["restored"], again["kept_vision_tokens_per_image"]) == (8, 28)
    assert "seconds_per_image" not in again


#: Runs last of all in each process.
LEFT = """
import atexit, os, pathlib, torch.distributed
def write():
    there = torch.distributed.is_initialized()
    pathlib.Path(FOLDER, "group-" + os.environ["RANK"]).write_text("there" if there else "left")
atexit.register(write)
"""


def test_two_processes_answer_as_one_and_one_goes_on(testbed: Path, run: Runs, tmp_path: Path) -> None:
    resume = tmp_path / "answers"
    given = {**MODEL_ARGS, "resume": resume}
    # 13 questions: the second process gets a copy of one, which must not count
    command = words(testbed, tmp_path / "out", given, limit=13)
    both = lmms_eval(command, tmp_path, before=f"FOLDER = {str(tmp_path)!r}\n{LEFT}", processes=2)
    assert both.returncode == 0, both.stderr
    # Threads of a group that is still there can abort a process after its last line.
    assert [(tmp_path / f"group-{rank}").read_text() for rank in (0, 1)] == ["left", "left"]
    alone = run(said(MODEL_ARGS), ["ocvtp_testbed"], 4, limit=13)
    rows, task = samples(tmp_path / "out"), "ocvtp_testbed"
    assert [row["filtered_resps"] for row in rows] == alone.answers(task)
    assert [row["token_counts"][0] for row in rows] == alone.counts(task)
    found = results(tmp_path / "out")
    ours, theirs = alone.found["results"][task], found["results"][task]
    assert theirs["exact_match,none"] == pytest.approx(float(ours["exact_match,none"]))
    (record,) = found["config"]["batch_sizes"]
    assert record["measured"]["requests"] == record["measured"]["images"] == 13
    assert record["measured"]["kept_vision_tokens_per_image"] == 28

    assert {path.name for path in resume.iterdir()} == {"0.jsonl", "1.jsonl"}
    second = resume / "1.jsonl"
    second.write_bytes(b"".join(second.read_bytes().splitlines(keepends=True)[:2]) + b'{"ans')
    resumed = run(said(given), [task], 4, limit=13)
    assert resumed.answers(task) == alone.answers(task)
    assert 7 < resumed.record["measured"]["restored"] < 13
