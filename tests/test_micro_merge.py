"""The microbenchmark of merging: its gates, and what it counts."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.micro import merge_cases as merge_module
from bench.micro.case import Candidate
from bench.micro.ceilings import CEILINGS, floor
from bench.micro.gates import GateError, poisoned_memory
from bench.micro.kmeans import PEER
from bench.micro.merge_cases import MergeCase, SpreadCase, merge_cases, spread_cases
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels.merge import merge_by, merge_tokens
from tests.test_micro_coverage import kmeans

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
TINY = MergeCase("tiny", 3, torch.float32, 6, 40, 16)
BACKWARD = SpreadCase("tiny", 3, torch.float32, 6, 40, 16)


pytestmark = pytest.mark.usefixtures("fresh_inputs")


def candidate(case: MergeCase | SpreadCase, name: str) -> Candidate:
    return next(each for each in case.candidates() if each.name == name)


@pytest.mark.skipif(not interpreting(), reason="Triton doesn't interpret here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [TINY, BACKWARD], ids=lambda case: case.op)
def test_interpreted_kernels_pass_the_gate_that_a_gpu_has_to(
    case: MergeCase | SpreadCase, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    inputs = case.draw(0, CPU)  # type: ignore[attr-defined]
    expected = case.expect(inputs)  # type: ignore[arg-type]
    for name in ("ours", "reference"):
        with poisoned_memory(), torch.no_grad():
            got = candidate(case, name).make(case)(inputs)
        assert case.check(name, got, expected)["error"] < torch.finfo(dtype).eps  # type: ignore[arg-type]


def test_a_merge_that_is_wrong_passes_no_gate() -> None:
    inputs = TINY.draw(0, CPU)
    expected = TINY.expect(inputs)
    rows, mass, owner = merge_tokens(*inputs, backend="torch")
    TINY.check("ours", (rows, mass, owner), expected)

    def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0, 1] = value
        return tensor

    elsewhere = owner.clone()
    token = next(n for n in range(TINY.tokens) if n not in inputs.indices[0].tolist())
    elsewhere[0, token] = (owner[0, token] + 1) % TINY.keep
    swapped = owner.clone()  # two equal distances, but not to itself
    wrong = {
        "nearer than the owner": (rows, mass, elsewhere),
        "not positions": (rows, mass, changed(owner, TINY.keep)),
        "positions among": (rows, mass, owner[:, 1:]),
        "masses": (rows, changed(mass, 1.5), owner),
        "masses: 18": (rows, torch.full_like(mass, torch.nan), owner),
        "relative error": (rows * (1 + 1e-6), mass, owner),
        "relative error nan": (changed(rows, torch.nan), mass, owner),
    }
    for told, got in wrong.items():
        with pytest.raises(GateError, match=told):
            TINY.check("ours", got, expected)
    tied = expected._replace(distances=torch.zeros_like(expected.distances))
    swapped[0, inputs.indices[0, 0]] = 1
    with pytest.raises(GateError, match="owners of the kept"):
        TINY.check("ours", (rows, mass, swapped), tied)


def test_a_gradient_that_is_wrong_passes_no_gate() -> None:
    inputs = BACKWARD.draw(0, CPU)
    expected = BACKWARD.expect(inputs)
    x = torch.zeros(3, 40, 16, requires_grad=True)
    rows = merge_by(x, inputs.owner, 6, backend="torch")
    (grad,) = torch.autograd.grad(rows, x, inputs.grad)
    BACKWARD.check("ours", (grad,), expected)
    for wrong, told in (
        (grad * (1 + 1e-6), "relative error"),
        (inputs.grad.gather(1, inputs.owner[:, :, None].expand_as(grad)), "relative error"),
        (grad.double(), "float64"),
    ):
        with pytest.raises(GateError, match=told):
            BACKWARD.check("ours", (wrong,), expected)


@pytest.mark.parametrize("case", [TINY, *merge_cases()], ids=lambda case: case.label)
def test_the_floor_counts_what_pytorch_multiplies(case: MergeCase) -> None:
    inputs = case.draw(0, CPU)
    with FlopCounterMode(display=False) as counter:
        merge_tokens(*inputs, backend="torch")
    assert case.work("ours").flops == counter.get_total_flops()


def test_floors_by_hand() -> None:
    case, backward = (
        of("llava-64", 64, torch.float16, 64, 576, 1024)
        for of in (MergeCase, SpreadCase)  # type: ignore[operator]
    )
    work = case.work("ours")
    assert work.read == 64 * 576 * 1024 * 2 + 64 * 64 * 8
    assert work.written == 64 * 64 * (1024 * 2 + 4) + 64 * 576 * 8
    assert work.flops == 2 * 64 * 576 * 64 * 1024
    least = floor(work, CEILINGS["h100"])
    # As exact as float32: three TF32 products, at 165 TFLOP/s together.
    assert (least.us, least.limit) == (pytest.approx(29.3, abs=0.1), "flops")
    least = floor(case.work(PEER), CEILINGS["h100"])
    assert (least.us, least.limit) == (pytest.approx(25.2, abs=0.1), "bytes")
    work = backward.work("ours")
    assert work.read == 64 * 64 * (1024 * 2 + 4) + 64 * 576 * 8
    assert work.written == 64 * 576 * 1024 * 2
    assert work.flops == 0


def test_sizes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "bench_device", lambda: GPU)
    for made in (merge_cases(), spread_cases()):
        sizes = [tuple(case.shape().values()) for case in made]
        assert sizes == [(1, 576, 1024, 64), (8, 576, 1024, 64), (64, 576, 1024, 64), (8, 2880, 1024, 160)]
        assert {case.dtype for case in made} == {torch.float16}


def test_the_peers_owners_and_means_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_kmeans", kmeans("flash_kmeans.kmeans_triton_impl"))
    inputs = TINY.draw(0, CPU)
    expected = TINY.expect(inputs)
    rows, mass, owner = candidate(TINY, PEER).make(TINY)(inputs)
    assert TINY.check(PEER, (rows, mass, owner), expected)["error"] < 1e-5
    for got in ((rows.flip(1), mass, owner), (rows, mass, owner.flip(1)), (rows * torch.nan, mass, owner)):
        with pytest.raises(GateError, match=PEER):
            TINY.check(PEER, got, expected)
