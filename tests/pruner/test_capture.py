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

from ocvtp import OCPruner
from ocvtp.pruner import capture
from ocvtp.pruner.assignment import Assignment
from ocvtp.pruner.capture import SlotRunner
from tests.conftest import SMALL, make_pruner
from tests.kernels.triton_device import DEVICE, ON_GPU, needs_gpu
from tests.rehearsal import Rehearsal

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
    return make_pruner(replace(SMALL, num_iters=2)).to(DEVICE)


def test_once_plain_then_captured_then_replayed(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    for seed, graphs in enumerate((0, 1, 1, 1)):
        x = features(seed=seed)
        assert_same(begin(runner, small, x), small, x)
        assert runner.graphs == graphs
    (lane,) = lanes
    first = ["run", "mark", "join"]
    second = ["run", "record", "run", "replay", "mark", "join"]
    again = ["run", "replay", "mark", "join"]
    assert lane.log == first + second + again + again


def test_shapes_and_dtypes_have_their_own_graphs(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    inputs = [features(1), features(3), features(1, 33), features(dtype=torch.float16)]
    for _ in range(3):
        for x in inputs:
            assert_same(begin(runner, small, x), small, x)
        assert_same(begin(runner, small, inputs[0], keep=7), small, inputs[0], keep=7)
    assert runner.graphs == 5
    strided = torch.cat([inputs[0].new_zeros(1, 1, SMALL.in_dim), inputs[0]], dim=1)[:, 1:]
    assert_same(begin(runner, small, strided), small, inputs[0])
    assert runner.graphs == 5


def test_results_are_the_callers_own(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    inputs = [features(seed=seed) for seed in range(4)]
    results = [begin(runner, small, x) for x in inputs]
    for got, x in zip(results, inputs, strict=True):
        assert_same(got, small, x)


def test_the_least_recently_used_graph_goes(
    lanes: list[Rehearsal], small: OCPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_GRAPHS", 2)
    runner = SlotRunner()
    for tokens in (10, 11, 10, 11, 10):
        begin(runner, small, features(tokens=tokens))
    assert runner.graphs == 2
    for _ in range(2):
        begin(runner, small, features(tokens=12))
    assert runner.graphs == 2
    assert lanes[0].log[-1] == "join"
    assert "wait" in lanes[0].log  # it may still have been running
    recorded = lanes[0].log.count("record")
    begin(runner, small, features(tokens=10))  # used last before 12: still there
    assert lanes[0].log.count("record") == recorded
    begin(runner, small, features(tokens=11))
    assert lanes[0].log.count("record") == recorded + 1


def test_new_parameters_get_a_new_graph(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    before = [begin(runner, small, x) for _ in range(3)][-1]
    with torch.no_grad():
        small.slot_mean.add_(1.0)
    after = begin(runner, small, x)
    assert not torch.equal(before.top.keys, after.top.keys)  # type: ignore[union-attr]
    assert_same(after, small, x)
    assert runner.graphs == 1
    other = make_pruner(replace(SMALL, num_iters=2), seed=5).to(DEVICE)
    assert_same(begin(runner, other, x), other, x)


def test_closing_gives_graphs_back_and_calls_still_work(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(2):
        begin(runner, small, x)
    runner.close()
    assert runner.graphs == 0
    assert lanes[0].log[-1] == "wait"
    for _ in range(3):
        assert_same(begin(runner, small, x), small, x)
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


def test_a_failed_capture_is_said_once_and_costs_nothing(
    lanes: list[Rehearsal], small: OCPruner, caplog: pytest.LogCaptureFixture
) -> None:
    runner, x = SlotRunner(), features()
    begin(runner, small, x)
    lanes[0].fails = True
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        for _ in range(3):
            assert_same(begin(runner, small, x), small, x)
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text
    assert runner.graphs == 0


def test_bad_input_is_refused_before_and_after_capture(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner, x = SlotRunner(), features()
    for _ in range(3):
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
        for seed in range(2):
            begin(runner, small, features(seed=seed))
    x = features(seed=3)
    assert_same(begin(runner, small, x), small, x)
    with torch.inference_mode():
        got = begin(runner, small, x)
    assert_same(got, small, x)


def test_copies_start_empty(lanes: list[Rehearsal], small: OCPruner) -> None:
    runner = SlotRunner()
    for _ in range(2):
        begin(runner, small, features())
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
