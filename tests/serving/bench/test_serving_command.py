"""``python -m bench.serving`` without servers: turns, record, deadline, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.e2e.methods import UNPRUNED
from bench.serving import __main__ as command
from bench.serving import counters, gate, measure
from bench.serving.contenders import BY_RULE, WITH_PRUNER, Contender
from bench.serving.load import Burst, Reply
from bench.serving.plugin import ROOT
from bench.serving.presets import PRESETS, rehearsal

TINY = rehearsal(PRESETS["cpu-small"])
NAMES = [UNPRUNED, WITH_PRUNER, BY_RULE]


class Fake:
    """A server in name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cache(self) -> counters.Cache:
        return counters.Cache(100, 16)

    def longest(self) -> int:
        return 1024


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """A run without servers: ``(server, clients, requests)`` of every burst."""
    sent: list[tuple[str, int, int]] = []

    def send(server: Fake, bodies: list[bytes], concurrency: int, *, answer: int, sample_s: float) -> Burst:
        sent.append((server.name, concurrency, len(bodies)))
        kept = 586 if server.name == UNPRUNED else 74
        tokens = (len(server.name),) * answer
        replies = [Reply(tokens, kept, 0.1, 0.2) for _ in bodies]
        return Burst(tuple(replies), 1.0 + len(sent), 0.5, 0.1, 1)

    @contextlib.contextmanager
    def serving(those: list[Contender], *args: Any, **options: Any) -> Any:
        yield [Fake(contender.name) for contender in those]

    answers = {name: [(len(name),) * TINY.answer] * 3 for name in NAMES}
    monkeypatch.setattr(gate, "_transformers", lambda *args: answers)
    monkeypatch.setattr(measure, "send", send)
    monkeypatch.setattr(command, "serving", serving)
    monkeypatch.setattr(command, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(command, "has_vllm", lambda: True)
    return sent


def run(folder: Path, *options: str, code: int = 0) -> Path:
    given = ["--rehearse", "--record", "--results", str(folder), "--commit", "abc", *options]
    assert command.main(given) == code
    (path,) = folder.glob("*/serving-*.json")
    return path


def test_rounds_are_in_turns_and_the_record_tells_everything(
    tmp_path: Path, rehearsed: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(run(tmp_path).read_text())
    assert [sent[0] for sent in rehearsed] == NAMES * (len(rehearsed) // 3)
    assert rehearsed[:6] == [
        *((name, 1, 6) for name in NAMES),
        *((name, 1, 1) for name in NAMES),
    ]  # gate, warm-up
    assert rehearsed[6:12] == [(name, 16, 8) for name in NAMES] * 2
    assert [(r["server"], r["concurrency"]) for r in result["rows"]] == [
        (name, load.concurrency) for load in TINY.loads for name in NAMES
    ]
    assert [r["prompt_tokens"] for r in result["rows"][:3]] == [586, 74, 74]
    head = {
        name: result[name] for name in ("vllm", "commit", "dtype", "keep", "image_tokens", "answer_tokens")
    }
    assert head == {
        "vllm": "0.32.0",
        "commit": "abc",
        "dtype": "float32",
        "keep": 64,
        "image_tokens": 576,
        "answer_tokens": TINY.answer,
    }
    assert len(result["gate"]) == 3
    assert "figures mean nothing" in result["note"]
    assert str(tmp_path) not in json.dumps(result)
    assert "checked: " in capsys.readouterr().out


def test_nothing_is_begun_when_time_has_run_out(
    tmp_path: Path, rehearsed: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 1.0, 1e9])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(ticks, 1e9))
    path = run(tmp_path, code=3)
    assert [row["concurrency"] for row in json.loads(path.read_text())["rows"]] == [16] * 3


def test_a_later_run_measures_what_is_left(tmp_path: Path, rehearsed: list[tuple[str, int, int]]) -> None:
    path = run(tmp_path)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "rows": whole["rows"][:3]}))
    rehearsed.clear()
    assert len(json.loads(run(tmp_path).read_text())["rows"]) == 9
    assert {sent[1] for sent in rehearsed[6:]} == {1, 4}


def test_nothing_is_measured_if_the_gate_is_not_green(
    tmp_path: Path, rehearsed: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_transformers", lambda *args: {name: [()] for name in NAMES})
    with pytest.raises(SystemExit, match="gate failed at cpu-small"):
        command.main(["--rehearse", "--record", "--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
    assert len(rehearsed) == 3


def test_who_ends_us_ends_the_servers(
    tmp_path: Path, rehearsed: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    @contextlib.contextmanager
    def serving(*args: Any, **options: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            yield []
        finally:
            left.append("servers")

    monkeypatch.setattr(command, "serving", serving)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        command.main(["--rehearse"])
    assert (caught.value.code, left) == (128 + signal.SIGTERM, ["servers"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "has_vllm", lambda: False)
    with pytest.raises(SystemExit, match=r"pip install vllm.*make test-serving builds build/vllm"):
        command.main(["--rehearse"])


def test_presets_and_devices_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "has_vllm", lambda: True)
    for preset, device, said in (
        ("llava-1.5-7b", "cpu", "needs a GPU; on a CPU: --preset cpu-small"),
        ("cpu-small", "cuda", "on a GPU: --preset llava-1.5-7b"),
    ):
        with pytest.raises(SystemExit):
            command.main(["--preset", preset, "--device", device])
        assert said in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 10**9, 80 * 10**9))
    with pytest.raises(SystemExit):
        command.main(["--preset", "llava-1.5-7b", "--device", "cuda"])
    assert "needs 75 GB of free GPU memory; there are 40" in capsys.readouterr().err


def test_it_is_imported_without_what_only_servers_have() -> None:
    code = "import sys; sys.modules['vllm'] = sys.modules['aiohttp'] = None; import bench.serving.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
