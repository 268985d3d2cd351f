"""The microbenchmark of diverse tokens: its gate, and what it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.micro import diversity_cases
from bench.micro.case import Candidate
from bench.micro.ceilings import CEILINGS, floor
from bench.micro.diversity_cases import DiverseCase, FarthestCase, VolumeCase, diverse_cases
from bench.micro.gates import GateError, poisoned_memory
from ocvtp_kernels import diversity
from ocvtp_kernels._arch import interpreting

CPU = torch.device("cpu")
TINY = [kind("tiny", 2, torch.float32, 6, 40, 16) for kind in (FarthestCase, VolumeCase)]
each = pytest.mark.parametrize("case", TINY, ids=lambda case: case.op)


pytestmark = pytest.mark.usefixtures("fresh_inputs")


def candidate(name: str) -> Candidate:
    return next(one for one in TINY[0].candidates() if one.name == name)


@pytest.mark.skipif(not interpreting(), reason="Triton doesn't interpret here")
@each
def test_interpreted_kernels_pass_the_gate_that_a_gpu_has_to(case: DiverseCase) -> None:
    case = replace(case, dtype=torch.float16)
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    for name in ("ours", "one program an image", "a launch a step", "reference"):
        with poisoned_memory(), torch.no_grad():
            gate = case.check(name, candidate(name).make(case)(inputs), expected)
        assert gate["error"] < 1e-6


@each
def test_a_choice_that_is_wrong_passes_no_gate(case: DiverseCase) -> None:
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    good = getattr(diversity, case.op)(inputs.x, case.keep, ascending=False)
    case.check("ours", (good,), expected)
    other = good.clone()
    other[0, 3] = next(token for token in range(case.tokens) if token not in good[0].tolist())
    late, outside, twice = good.roll(1, dims=1), good.clone(), good.clone()
    outside[0, -1] = case.tokens
    twice[0, 1] = twice[0, 0]
    wrong = {
        "falls short": other,
        "falls short of": late,
        "of the image": outside,
        "twice": twice,
        "int32": good.int(),
        r"\[2, 5\]": good[:, :5],
    }
    for told, order in wrong.items():
        with pytest.raises(GateError, match=told):
            case.check("ours", (order,), expected)


@pytest.mark.parametrize("case", [*TINY, *diverse_cases()[:1]], ids=lambda case: case.label)
def test_the_floor_counts_what_pytorch_multiplies(case: DiverseCase) -> None:
    inputs = case.draw(0, CPU)
    with FlopCounterMode(display=False) as counter:
        candidate("reference").make(case)(inputs)
    assert case.work("ours").flops == counter.get_total_flops()


def test_floor_by_hand() -> None:
    work = FarthestCase("llava-64", 64, torch.float16, 64, 576).work("ours")
    assert work.flops == 2 * 64 * 576 * 1024 * 63
    assert (work.read, work.written) == (64 * 576 * 1024 * 2, 64 * 64 * 8)
    least = floor(work, CEILINGS["h100"])
    assert (least.us, least.limit) == (pytest.approx(28.8, abs=0.1), "flops")


def test_sizes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity_cases, "bench_device", lambda: torch.device("cuda", 0))
    sizes = {tuple(case.shape().values()) for case in diverse_cases()}
    assert sizes == {
        *((batch, 576, 1024, 64) for batch in (1, 8, 64)),
        *((batch, 2880, 1024, 160) for batch in (1, 8)),
    }
    assert {case.dtype for case in diverse_cases()} == {torch.float16}
