"""Recording a CUDA graph, and what is left when that fails. On a fake of torch.cuda, and once on a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ocvtp.pruner import lane
from ocvtp.pruner.folding import settled
from ocvtp.pruner.lane import CaptureBusyError, CudaLane, record_graph, recorded_by_others
from ocvtp_kernels.slot_attention import SlotStart
from tests.fake_cuda import FakeCuda
from tests.kernels.triton_device import needs_gpu

DEVICE = torch.device("cpu")  # in the fake's eyes a GPU


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(lane, "_wrecks", [])
    monkeypatch.setattr(lane, "_streams", weakref.WeakSet())
    return fake


class OutOfMemory(RuntimeError):
    pass


def explode() -> None:
    raise OutOfMemory("CUDA out of memory")


def test_recorded_and_replayed_on_the_lane(cuda: FakeCuda) -> None:
    made = CudaLane(DEVICE)
    result, replay = made.record(lambda: "result")
    assert result == "result"
    made.run(replay, [])
    assert cuda.left() == []
    assert cuda.log == ["record on side 1", "recorded", "side 1 waits for stream 0 of 0", "replay on side 1"]


@pytest.mark.parametrize("where", ["begin", "end", "instantiate"])
def test_nothing_is_left_of_a_recording_that_fails(cuda: FakeCuda, where: str) -> None:
    made = CudaLane(DEVICE)
    _, before = made.record(lambda: None)
    cuda.fails = [where]
    with pytest.raises(RuntimeError, match="CUDA error"):
        made.record(lambda: None)
    assert cuda.left() == []
    made.run(before, [])  # graphs of before still draw random numbers
    _, replay = made.record(lambda: None)  # and there can be new ones
    made.run(replay, [])
    assert cuda.left() == []


@pytest.mark.parametrize("also", [[], ["end"]])
def test_the_works_own_error_comes_through(cuda: FakeCuda, also: list[str]) -> None:
    """That ending fails too is a consequence."""
    cuda.fails = list(also)
    with pytest.raises(OutOfMemory, match="out of memory"):
        CudaLane(DEVICE).record(explode)
    assert cuda.fails == []
    assert cuda.left() == []


def test_when_cleaning_up_fails_too_the_first_error_comes_through(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.fails = ["begin", "begin"]
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaLane(DEVICE).record(lambda: None)
    assert cuda.current_stream() is cuda.defaults[0]


def test_a_pool_that_cant_be_freed_is_left_alone(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take no other recording."""
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    made = CudaLane(DEVICE)
    _, before = made.record(lambda: None)
    cuda.fails = ["end"]
    with pytest.raises(RuntimeError):
        made.record(lambda: None)
    _, after = made.record(lambda: None)
    for replay in (before, after):
        made.run(replay, [])


def test_the_pool_is_freed_in_old_pytorch_too(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2.7 has another name for it."""
    monkeypatch.setattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", cuda._end_pool, raising=False)
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    cuda.fails = ["end"]
    with pytest.raises(RuntimeError):
        CudaLane(DEVICE).record(lambda: None)
    assert cuda.left() == []
    assert set(cuda.users.values()) == {0}


def test_work_that_changes_streams(cuda: FakeCuda) -> None:
    """What is left current by the work, or by its error, is not left to the caller."""
    made = CudaLane(DEVICE)

    def wander() -> None:
        cuda.set_stream(cuda.new_stream())

    made.record(wander)
    assert cuda.left() == []

    def wander_and_explode() -> None:
        wander()
        explode()

    with pytest.raises(OutOfMemory):
        made.record(wander_and_explode)
    assert cuda.left() == []


def test_interrupts_leave_nothing_either(cuda: FakeCuda) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaLane(DEVICE).record(interrupt)
    assert cuda.left() == []
    CudaLane(DEVICE).record(lambda: None)


def test_one_recording_at_a_time_in_a_process(cuda: FakeCuda) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert leave.wait(10)

    thread = threading.Thread(target=lambda: CudaLane(DEVICE).record(slow))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(CaptureBusyError):
        CudaLane(DEVICE).record(lambda: None)
    leave.set()
    thread.join()
    CudaLane(DEVICE).record(lambda: None)
    with pytest.raises(CaptureBusyError):  # not a deadlock
        CudaLane(DEVICE).record(lambda: CudaLane(DEVICE).record(lambda: None))
    assert cuda.left() == []


def test_a_pool_without_graphs_is_not_recorded_into(cuda: FakeCuda) -> None:
    made = CudaLane(DEVICE)
    _, first = made.record(lambda: None)
    _, second = made.record(lambda: None)
    assert list(cuda.users.values()) == [2]  # shared
    del first, second
    assert list(cuda.users.values()) == [0]
    made.record(lambda: None)
    assert cuda.left() == []


def test_inputs_are_kept_even_if_the_work_raises(cuda: FakeCuda) -> None:
    made = CudaLane(DEVICE)
    with pytest.raises(OutOfMemory):
        made.run(explode, [torch.zeros(1)])
    assert cuda.log == ["side 1 waits for stream 0 of 0", "kept for side 1"]
    assert cuda.left() == []


def test_what_is_held_is_noted_once(cuda: FakeCuda) -> None:
    made = CudaLane(DEVICE)
    weights = [torch.zeros(1) for _ in range(3)]
    made.hold(weights)
    made.hold(weights)
    assert cuda.log.count("kept for side 1") == 3
    for _ in range(200):  # an address may be another tensor's by now
        made.hold([torch.zeros(1)])
    assert cuda.log.count("kept for side 1") == 203
    assert len(made._held) < 150


def test_the_lane_is_of_high_priority_and_on_its_device(cuda: FakeCuda) -> None:
    made = CudaLane(torch.device("cuda", 1))
    assert made._stream.priority == -1
    seen: list[int] = []
    made.run(lambda: seen.append(cuda.current_device()), [])
    assert seen == [1]
    assert cuda.left() == []


def test_no_two_lanes_have_a_stream_in_common(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has 32 of them, and lends them in turn."""
    pool = [cuda.new_stream(priority=-1) for _ in range(32)]
    lent = itertools.cycle(pool)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: next(lent))
    first = CudaLane(DEVICE)
    for _ in range(100):  # models come and go
        assert CudaLane(DEVICE)._stream is not first._stream


def test_whose_recording_is_asked_for(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the features' device, not of the current one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cuda.current_device() == 1)
    assert recorded_by_others(torch.device("cuda", 1))
    assert not recorded_by_others(torch.device("cuda", 0))
    assert not recorded_by_others(torch.device("cpu"))


def test_a_graph_of_ones_own(cuda: FakeCuda) -> None:
    stream: Any = cuda.new_stream()
    result, graph = record_graph(lambda: 3, stream)
    assert result == 3
    graph.replay()
    assert cuda.left() == []


def run_alone(program: str, **environment: str) -> str:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PROGRAM = """
import torch
from ocvtp.pruner.lane import CudaLane
lane, x = CudaLane(torch.device("cuda", 0)), torch.ones(8, device="cuda")
lane.run(lambda: x * 2, [x])
before = torch.cuda.current_stream()

def attempt(work):
    try:
        made, replay = lane.record(work)
    except RuntimeError as error:
        made, replay = str(error).splitlines()[0], None
    assert torch.cuda.current_stream() == before
    assert not torch.cuda.is_current_stream_capturing()
    torch.rand(2, device="cuda")  # random numbers are as they were
    return made, replay

first, replay = attempt(lambda: x * 2)
for work in (lambda: x.sum().item(), lambda: torch.cuda.synchronize(), lambda: 1 / 0):
    try:
        print(attempt(work))
    except ZeroDivisionError:
        pass
second, again = attempt(lambda: x * 3)
for made, call, want in ((first, replay, 2), (second, again, 3)):
    if call is None:
        print("not recorded:", made)
        continue
    lane.run(call, [])
    lane.join(lane.mark(), [made])
    assert made.tolist() == [want] * 8
print("same stream")
"""


@needs_gpu
@pytest.mark.parametrize("blocking", ["0", "1"])
def test_real_recordings_that_fail(blocking: str) -> None:
    """In a process of its own: PyTorch says which stream is current, also where launches wait."""
    out = run_alone(PROGRAM, CUDA_LAUNCH_BLOCKING=blocking)
    assert out.rstrip().endswith("same stream")
    if blocking == "0":
        assert "not recorded" not in out


def test_weights_are_not_folded_into_somebody_elses_graph(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would own them: looked at on their own device."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cuda.current_device() == 1)
    with pytest.raises(RuntimeError, match="before capturing it"):
        settled(lambda: SlotStart(*[torch.zeros(1)] * 4), torch.device("cuda", 1))
    made = settled(lambda: SlotStart(*[torch.zeros(1)] * 4), torch.device("cuda", 0))
    assert cuda.log == ["the host waits for stream 0 of 0"]
    assert len(made) == 4
