"""The runner's control flow: what is captured when, and whose results are whose. No GPU needed."""

from __future__ import annotations

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from ocvtp import OCPruner
from ocvtp.pruner import capture
from ocvtp.pruner.admission import SIGHTINGS, WINDOW
from ocvtp.pruner.assignment import Assignment, Plan
from ocvtp.pruner.capture import SlotRunner
from ocvtp.pruner.lane import CaptureBusyError, CudaLane
from ocvtp_kernels._launch import recording
from ocvtp_kernels.slot_attention import Places, TopTokens
from tests.conftest import SMALL, make_pruner
from tests.fake_cuda import CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, FakeCuda
from tests.kernels.test_slot_attention_triton import few_programs
from tests.kernels.triton_device import DEVICE, ON_GPU, needs_gpu
from tests.rehearsal import Rehearsal

__all__ = ["few_programs"]
KEEP = 4


def features(
    images: int = 1, tokens: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, SMALL.in_dim, generator=generator).to(DEVICE, dtype)


def begin(
    runner: SlotRunner, pruner: OCPruner, x: torch.Tensor, keep: int = KEEP, **options: Any
) -> Assignment:
    options = {"backend": "triton", "precision": "fp32", **options}
    return runner.begin(pruner, x, keep, **options).get()


def assert_same(got: Assignment, pruner: OCPruner, x: torch.Tensor, keep: int = KEEP) -> None:
    want = pruner.assign(x, keep, backend="triton", precision="fp32")
    assert got.top is not None
    assert want.top is not None
    assert all(map(torch.equal, got.top, want.top))
    assert torch.equal(got.select().indices, want.select().indices)


@pytest.fixture
def small() -> OCPruner:
    return make_pruner(replace(SMALL, num_iters=1)).to(DEVICE)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> OCPruner:
    """Computes nothing: for tests of what is done when."""

    def find(plan: Plan, normalised: torch.Tensor, places: Places) -> TopTokens:
        places.packed.fill_(7)
        places.top.finite.fill_(True)
        return places.top

    def run(plan: Plan, features: torch.Tensor) -> Assignment:
        return plan.assignment(features, find(plan, features, plan.places(features)))

    monkeypatch.setattr(Plan, "find", find)
    monkeypatch.setattr(Plan, "run", run)
    monkeypatch.setattr(Plan, "normalise", lambda plan, features, out: out.copy_(features))
    return make_pruner(replace(SMALL, num_iters=2)).to(DEVICE)


def test_plain_at_first_then_captured_then_replayed(lanes: list[Rehearsal]) -> None:
    runner, small = SlotRunner(), make_pruner(replace(SMALL, num_iters=2)).to(DEVICE)
    for seed, graphs in enumerate((0, 0, 1, 1)):
        x = features(seed=seed)
        assert_same(begin(runner, small, x), small, x)
        assert runner.graphs == graphs
    (lane,) = lanes
    plain = ["run", "mark", "join"]
    captured = ["run", "record", "run", "replay", "mark", "join"]
    again = ["run", "replay", "mark", "join"]
    assert lane.log == plain + plain + captured + again


def test_shapes_have_their_own_graphs(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    inputs = [features(1), features(2, 33)]
    for _ in range(SIGHTINGS):
        for x in inputs:
            begin(runner, small, x)
    assert runner.graphs == 2
    strided = torch.cat([inputs[0].new_zeros(1, 1, SMALL.in_dim), inputs[0]], dim=1)[:, 1:]
    for x, like in ((inputs[1], inputs[1]), (strided, inputs[0])):
        assert_same(begin(runner, small, x), small, like)
    half = features(dtype=torch.float16)
    assert_same(begin(runner, small, half), small, half)  # the products' dtype is what counts
    double = inputs[0].double()
    assert_same(begin(runner, small, double), small, double)
    assert runner.graphs == 2
    assert lanes[0].log.count("replay") == 6


def test_products_and_budgets_have_their_own_graphs(lanes: list[Rehearsal], quick: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(SIGHTINGS):
        begin(runner, quick, x)
        begin(runner, quick, x, keep=7)
        begin(runner, quick, x, precision="fp16")
        begin(runner, quick, x, seed=1)
    assert runner.graphs == 4
    for seed in (0, 1, 0, 1):  # one seed's graph is not the other's
        begin(runner, quick, x, seed=seed)
    assert lanes[0].log.count("record") == 4


def test_results_are_the_callers_own(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    inputs = [features(seed=seed) for seed in range(4)]
    results = [begin(runner, small, x) for x in inputs]
    for got, x in zip(results, inputs, strict=True):
        assert_same(got, small, x)


def test_no_storm_when_shapes_are_more_than_graphs(lanes: list[Rehearsal], quick: OCPruner) -> None:
    """A capture for each call is what takes longest of all."""
    runner = SlotRunner()
    shapes = [features(tokens=8 + extra) for extra in range(10)]
    for turn in range(20):
        for x in shapes:
            begin(runner, quick, x)
        if turn == 5:
            lanes[0].log.clear()
    assert lanes[0].log.count("record") == lanes[0].log.count("wait") == 0
    assert lanes[0].log.count("replay") == 14 * capture.MOST_GRAPHS
    assert runner.graphs == capture.MOST_GRAPHS


def test_a_graph_gives_way_to_what_comes_more_often(
    lanes: list[Rehearsal], quick: OCPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_GRAPHS", 1)
    runner, old, new = SlotRunner(), features(tokens=10), features(tokens=11)
    for _ in range(SIGHTINGS):
        begin(runner, quick, old)
    for _ in range(2 * SIGHTINGS - 1):
        begin(runner, quick, new)
    assert lanes[0].log.count("record") == 1
    begin(runner, quick, new)
    assert lanes[0].log.count("record") == 2
    assert lanes[0].log.count("wait") == 1  # it may still have been running
    assert runner.graphs == 1
    for _ in range(SIGHTINGS):
        begin(runner, quick, old)
    assert lanes[0].log.count("record") == 2  # not back at once


class Operations(TorchDispatchMode):
    """Names of PyTorch's operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("as_strided", "view", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(ON_GPU, reason="counted in the interpreter")
def test_what_a_captured_call_launches(lanes: list[Rehearsal], small: OCPruner) -> None:
    """The first kernel, the graph, one copy; and the selection, which here is eager."""
    runner, x = SlotRunner(), features(2).half()[:, 1:]
    for _ in range(SIGHTINGS):
        begin(runner, small, x, precision="fp16")
    lanes[0].replays = False
    with Operations() as operations, recording() as launches:
        got = begin(runner, small, x, precision="fp16")
    assert operations.names == ["clone"]
    assert [launch.kernel.fn.__name__ for launch in launches] == ["normalise"]
    assert lanes[0].log[-4:] == ["run", "replay", "mark", "join"]
    with recording() as launches:
        got.select_rows(None, x)
    assert len(launches) == 1


@pytest.mark.parametrize("fails", [[], ["begin"], ["end"]])
def test_a_cuda_lane_from_call_to_call(
    quick: OCPruner, monkeypatch: pytest.MonkeyPatch, fails: list[str]
) -> None:
    """On a fake of torch.cuda: whatever a capture does, the caller's stream is the caller's."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(capture, "lane_for", CudaLane)
    runner, x = SlotRunner(), features()
    for call in range(4 * WINDOW):
        if call == SIGHTINGS - 1:
            cuda.fails = list(fails)
        begin(runner, quick, x)
        assert cuda.left() == []
    assert runner.graphs == 1
    assert cuda.log.count("recorded") == 1 + len(fails)  # cleaning up records something
    replays = cuda.log.count("replay on side 1")
    assert replays == 4 * WINDOW - SIGHTINGS + 1 - (32 if fails else 0)
    runner.close()
    assert cuda.log[-1] == "the host waits for side 1"


def test_large_calls_are_not_captured(lanes: list[Rehearsal], quick: OCPruner) -> None:
    """The GPU takes longer for them than Python does."""
    runner = SlotRunner()
    images = capture.MOST_ROWS // 256
    for _ in range(SIGHTINGS):
        begin(runner, quick, features(images + 1, 256))
    assert runner.graphs == 0
    for _ in range(SIGHTINGS):
        begin(runner, quick, features(images, 256))
    assert runner.graphs == 1


def test_new_parameters_get_a_new_graph(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    before = [begin(runner, small, x) for _ in range(SIGHTINGS)][-1]
    with torch.no_grad():
        small.slot_mean.add_(1.0)
    after = [begin(runner, small, x) for _ in range(SIGHTINGS)][-1]
    assert lanes[0].log.count("record") == 2
    assert not torch.equal(before.top.keys, after.top.keys)  # type: ignore[union-attr]
    assert_same(after, small, x)


def test_parameters_that_change_all_the_time_are_not_captured(
    lanes: list[Rehearsal], quick: OCPruner
) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(12):
        with torch.no_grad():
            quick.slot_mean.add_(1.0)
        begin(runner, quick, x)
    assert runner.graphs == 0


def test_graphs_of_old_parameters_go(lanes: list[Rehearsal], quick: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(SIGHTINGS):
        begin(runner, quick, x)
    with torch.no_grad():
        quick.slot_mean.add_(1.0)
    big = features(1, 256)
    for tokens in range(2 * WINDOW):  # shapes that come once
        begin(runner, quick, big[:, : 10 + tokens])
    assert runner.graphs == 0
    assert "wait" in lanes[0].log


def test_graphs_of_old_parameters_go_while_others_are_used(lanes: list[Rehearsal], quick: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for changes in range(2):
        with torch.no_grad():
            quick.slot_mean.add_(1.0)
        for _ in range(SIGHTINGS):
            begin(runner, quick, x)
        assert runner.graphs == 1 + changes
    for _ in range(2 * WINDOW):
        begin(runner, quick, x)
    assert runner.graphs == 1
    assert lanes[0].log[-4:] == ["run", "replay", "mark", "join"]


def test_what_the_lane_reads_outlives_its_parameters(lanes: list[Rehearsal], quick: OCPruner) -> None:
    """Should the caller never join."""
    runner, x = SlotRunner(), features()
    runner.begin(quick, x, KEEP, backend="triton", precision="fp32")
    plan = quick.prepare(x, KEEP, backend="triton", precision="fp32")
    held = {id(tensor) for tensor in lanes[0].held}
    assert held >= {id(tensor) for tensor in (*plan.weights, *plan.start)}


def test_closing_gives_graphs_back_and_calls_still_work(lanes: list[Rehearsal], quick: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(SIGHTINGS):
        begin(runner, quick, x)
    runner.close()
    assert runner.graphs == 0
    assert lanes[0].log[-1] == "wait"
    for _ in range(SIGHTINGS):
        begin(runner, quick, x)
    assert runner.graphs == 0


@pytest.mark.parametrize("why", ["not wanted", "map wanted", "training", "torch"])
def test_what_is_not_captured(lanes: list[Rehearsal], small: OCPruner, why: str) -> None:
    runner, x = SlotRunner(capture=why != "not wanted"), features()
    options: dict[str, Any] = {}
    if why == "map wanted":
        options["return_attention"] = True
    elif why == "training":
        small.train()
    elif why == "torch":
        options["backend"] = "torch"
    for _ in range(3):
        got = begin(runner, small, x, **options)
        want = small(x, KEEP, backend="triton", precision="fp32")
        assert torch.equal(got.select().indices, want.indices)
    assert runner.graphs == 0
    assert (got.attention is not None) == (why in ("map wanted", "torch"))


def test_a_capture_that_is_refused_twice_is_given_up_and_said_once(
    lanes: list[Rehearsal], quick: OCPruner, caplog: pytest.LogCaptureFixture
) -> None:
    runner, x = SlotRunner(), features()
    begin(runner, quick, x)
    lanes[0].error = RuntimeError(CAPTURE_UNSUPPORTED)
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        for _ in range(2 * WINDOW):
            begin(runner, quick, x)
    assert lanes[0].attempts == 2
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text
    lanes[0].error = None
    for _ in range(4 * WINDOW):
        begin(runner, quick, x)
    assert runner.graphs == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(CAPTURE_INVALIDATED),
        CaptureBusyError("another CUDA graph is being recorded"),
        RuntimeError(CAPTURE_UNSUPPORTED),  # once: somebody else's capture makes CUDA say so
    ],
    ids=lambda error: str(error)[:40],
)
def test_a_capture_that_fails_is_tried_again_later(
    lanes: list[Rehearsal], quick: OCPruner, error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    runner, x = SlotRunner(), features()
    begin(runner, quick, x)
    begin(runner, quick, x)
    lanes[0].error = error
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        assert begin(runner, quick, x).select().indices.shape == (1, KEEP)
        lanes[0].error = None
        begin(runner, quick, x)
        assert runner.graphs == 0  # not at once
        for _ in range(WINDOW):
            begin(runner, quick, x)
    assert runner.graphs == 1
    assert lanes[0].attempts == 2
    assert caplog.records == []


def test_failures_are_tried_again_ever_more_rarely(lanes: list[Rehearsal], quick: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    begin(runner, quick, x)
    lanes[0].error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(500):
        begin(runner, quick, x)
    assert lanes[0].attempts == 5


def test_bad_input_is_refused_before_and_after_capture(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(SIGHTINGS):
        with pytest.raises(ValueError, match="between 1 and 20"):
            begin(runner, small, x, keep=21)
        if not ON_GPU:  # there nobody looks so early: see test_real_graphs_survive_nan
            with pytest.raises(ValueError, match="NaN or Inf"):
                begin(runner, small, torch.full_like(x, torch.nan))
        assert_same(begin(runner, small, x), small, x)


def test_threads_get_their_own_answers(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    inputs = [features(1 + seed % 2, seed=seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: begin(runner, small, x), inputs))
    for got, x in zip(results, inputs, strict=True):
        assert_same(got, small, x)
    assert runner.graphs == 2
    assert len(lanes) == 1


def test_inference_mode_does_not_stick(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    with torch.inference_mode():
        for seed in range(SIGHTINGS):
            begin(runner, small, features(seed=seed))
    x = features(seed=3)
    assert_same(begin(runner, small, x), small, x)
    with torch.inference_mode():
        got = begin(runner, small, x)
    assert_same(got, small, x)


def test_copies_start_empty(lanes: list[Rehearsal], quick: OCPruner) -> None:
    runner = SlotRunner()
    for _ in range(SIGHTINGS):
        begin(runner, quick, features())
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert other.graphs == 0
    assert runner.graphs == 1


def test_without_a_lane_it_just_assigns(small: OCPruner) -> None:
    if ON_GPU:
        pytest.skip("a GPU has a lane")
    runner, x = SlotRunner(), features()
    for _ in range(3):
        assert_same(begin(runner, small, x), small, x)
    assert runner.graphs == 0


@needs_gpu
def test_real_graphs() -> None:
    """Overlapped with work on the caller's stream, over changing inputs, from two threads."""
    pruner, runner = make_pruner().to(DEVICE), SlotRunner()
    big = torch.randn(4096, 4096, device=DEVICE)
    for seed in range(6):
        x = features(2, 577, seed=seed)
        pending = runner.begin(pruner, x, 64, backend="triton", precision="fp16")
        big = (big @ big).clamp(-1, 1)  # the layers that follow
        got = pending.get().select()
        want = pruner.assign(x, 64, backend="triton", precision="fp16").select()
        assert torch.equal(got.indices, want.indices)
    assert runner.graphs == 1
    runner.close()


def real_calls(device: torch.device, calls: int = 6) -> int:
    """Of a pruner of its own, each as without a runner; how many graphs there are then."""
    pruner, runner = make_pruner().to(device), SlotRunner()
    for seed in range(calls):
        x = features(1, 65, seed=seed).to(device)
        got = runner.begin(pruner, x, 16, backend="triton", precision="fp16").get().select()
        want = pruner.assign(x, 16, backend="triton", precision="fp16").select()
        assert torch.equal(got.indices, want.indices)
    graphs = runner.graphs
    runner.close()
    return graphs


@needs_gpu
def test_real_graphs_in_threads() -> None:
    """One recording at a time: whoever is in the way of another tries again later."""
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(real_calls, [DEVICE] * 4, [40] * 4)) == [1] * 4
    torch.rand(2, device=DEVICE)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@needs_gpu
def test_real_graphs_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert real_calls(torch.device("cuda", 1)) == 1
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_real_graphs_survive_nan() -> None:
    """A replay with a bad image among good ones: it is told of later, and the GPU goes on."""
    pruner, runner = make_pruner().to(DEVICE), SlotRunner()
    options: dict[str, Any] = {"backend": "triton", "precision": "fp16"}
    x = features(3, 577)
    bad = x.clone()
    bad[1, 5, 7] = torch.nan
    want = runner.begin(pruner, x, 64, **options).get().select()
    for _ in range(3):
        got = runner.begin(pruner, bad, 64, **options).get().select()
        assert got.from_slots[1] == -1
        assert torch.equal(got.indices[[0, 2]], want.indices[[0, 2]])
        with pytest.raises(ValueError, match=r"image \[1\] of 3"):
            pruner.check()
    assert runner.graphs == 1
    assert torch.equal(runner.begin(pruner, x, 64, **options).get().select().indices, want.indices)
    runner.close()
