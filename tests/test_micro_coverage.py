"""The microbenchmark of a round of refinement: its gate, and what it counts."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.micro import coverage_cases
from bench.micro.case import Candidate
from bench.micro.ceilings import CEILINGS, floor
from bench.micro.coverage_cases import RoundCase, RoundInputs, round_cases
from bench.micro.gates import GateError, poisoned_memory
from bench.micro.kmeans import PEER
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels.coverage import coverage_error, refine

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
TINY = RoundCase("tiny", 3, torch.float32, 6, 40, 16)


pytestmark = pytest.mark.usefixtures("fresh_inputs")


def candidate(name: str) -> Candidate:
    return next(each for each in TINY.candidates() if each.name == name)


@pytest.mark.skipif(not interpreting(), reason="Triton doesn't interpret here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_kernels_pass_the_gate_that_a_gpu_has_to(dtype: torch.dtype) -> None:
    case = replace(TINY, dtype=dtype)
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    assert expected.untied.any()
    for name in ("ours", "reference"):
        with poisoned_memory(), torch.no_grad():
            gate = case.check(name, candidate(name).make(case)(inputs), expected)
        assert gate["error"] < 1e-6
        assert gate["images_compared_by_token"] == int(expected.untied.sum())


def test_a_round_that_is_wrong_passes_no_gate() -> None:
    inputs = TINY.draw(0, CPU)
    expected = TINY.expect(inputs)
    good = refine(*inputs, 1, backend="torch")
    TINY.check("ours", (good,), expected)
    outside = good.clone()
    outside[0, -1] = TINY.tokens
    twice = good.clone()
    twice[0, 1] = twice[0, 0]
    wrong = {
        "error rose|relative": inputs.indices,  # not moved
        "ascending": good.flip(1),
        "unique": twice,
        "of the image": outside,
        "int32": good.int(),
        r"\[3, 5\]": good[:, :5],
    }
    for told, kept in wrong.items():
        with pytest.raises(GateError, match=told):
            TINY.check("ours", (kept,), expected)


def test_another_token_as_good_is_wrong_only_where_nothing_is_tied() -> None:
    inputs = TINY.draw(0, CPU)
    expected = TINY.expect(inputs)
    good = refine(*inputs, 1, backend="torch")
    other = good.clone()
    other[0, 0] = next(token for token in range(TINY.tokens) if token not in good[0].tolist())
    other = other.sort(dim=1).values
    # As if both covered the same.
    lax = expected._replace(
        after=coverage_error(expected.x, other, backend="torch"), before=expected.before * 9
    )
    with pytest.raises(GateError, match="kept tokens"):
        TINY.check("ours", (other,), lax._replace(untied=torch.ones(3, dtype=torch.bool)))
    gate = TINY.check("ours", (other,), lax._replace(untied=torch.tensor([False, True, True])))
    assert gate["images_compared_by_token"] == 2


def test_ties_are_seen_wherever_a_round_decides() -> None:
    """Tokens on a line; 0 and 10 are kept."""
    case = RoundCase("line", 1, torch.float32, 2, 5, 1)

    def untied(*tokens: float) -> bool:
        inputs = RoundInputs(torch.tensor(tokens)[None, :, None], torch.tensor([[0, 4]]))
        return bool(case.expect(inputs).untied)

    assert untied(0.0, 2.0, 3.0, 8.5, 10.0)
    assert not untied(0.0, 2.0, 5.0, 8.5, 10.0)  # between both kept ones
    assert not untied(0.0, 2.0, 2.0, 8.5, 10.0)  # the same token twice, the best of its cluster
    assert not untied(0.0, 0.0, 0.0, 10.0, 10.0)  # nothing to gain: does it move?


@pytest.mark.parametrize("case", [TINY, *round_cases()], ids=lambda case: case.label)
def test_the_floor_counts_what_pytorch_multiplies(case: RoundCase) -> None:
    inputs = case.draw(0, CPU)
    with FlopCounterMode(display=False) as counter:
        refine(*inputs, 1, backend="torch")
    assert case.work("ours").flops == counter.get_total_flops()


def test_floor_by_hand() -> None:
    case = RoundCase("llava-64", 64, torch.float16, 64, 576)
    work, peer = case.work("ours"), case.work(PEER)
    product = 2 * 64 * 576 * 64 * 1024
    assert (work.flops, peer.flops) == (3 * product, 2 * product)
    assert work.read == 64 * 576 * 1024 * 2 + 64 * 64 * 8
    assert work.written == 64 * 64 * 8
    assert peer.read == 64 * 576 * 1024 * 2 + 64 * 64 * 1024 * 2
    assert peer.written == 64 * 64 * 1024 * 2
    least = floor(work, CEILINGS["h100"])
    # As exact as float32: three TF32 products, at 165 TFLOP/s together.
    assert (least.us, least.limit) == (pytest.approx(14.496e9 / 165e12 * 1e6, rel=1e-3), "flops")
    assert least.us == pytest.approx(87.9, abs=0.1)


def test_sizes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_cases, "bench_device", lambda: GPU)
    sizes = [tuple(case.shape().values()) for case in round_cases()]
    assert sizes == [(1, 576, 1024, 64), (8, 576, 1024, 64), (64, 576, 1024, 64), (8, 2880, 1024, 160)]
    assert {case.dtype for case in round_cases()} == {torch.float16}


# --------------------------------------------------------------------------------------------------- the peer


def kmeans(module: str) -> ModuleType:
    """What the benchmark uses of the peer, in PyTorch and of the given module."""

    def batch_kmeans_Euclid(
        x: torch.Tensor, n_clusters: int, max_iters: int, init_centroids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        assert max_iters == 1
        owner = torch.cdist(x, init_centroids).argmin(dim=2)
        member = torch.nn.functional.one_hot(owner, n_clusters).to(x.dtype)
        return owner, member.mT @ x / member.sum(dim=1)[:, :, None], 1

    batch_kmeans_Euclid.__module__ = module
    made = ModuleType("flash_kmeans")
    made.__spec__ = importlib.machinery.ModuleSpec("flash_kmeans", None)
    made.batch_kmeans_Euclid = batch_kmeans_Euclid
    return made


def test_the_peers_means_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_kmeans", kmeans("flash_kmeans.kmeans_triton_impl"))
    inputs = TINY.draw(0, CPU)
    expected = TINY.expect(inputs)
    (means,) = candidate(PEER).make(TINY)(inputs)
    assert TINY.check(PEER, (means,), expected)["error"] < 1e-5
    kept = inputs.x.gather(1, inputs.indices[:, :, None].expand(-1, -1, TINY.width))
    for got in (kept, means.flip(1), means * torch.nan):
        with pytest.raises(GateError, match=PEER):
            TINY.check(PEER, (got,), expected)


def test_the_peer_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = candidate(PEER).why_not
    assert "no GPU" in (why_not(TINY, CPU) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install" in (why_not(TINY, GPU) or "")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_kmeans", kmeans("flash_kmeans.torch_fallback"))
    assert "PyTorch instead" in (why_not(TINY, GPU) or "")
    monkeypatch.setitem(sys.modules, "flash_kmeans", kmeans("flash_kmeans.kmeans_triton_impl"))
    assert why_not(TINY, GPU) is None
