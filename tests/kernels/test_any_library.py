"""Where we promise bits, they rest on no library's taste in layouts and sizes."""

from __future__ import annotations

import pytest
import torch

from ocvtp_kernels._alike import image_by_image, laid_out
from ocvtp_kernels.coverage import refine_measured
from ocvtp_kernels.merge import merge_tokens
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.slot_attention import SlotAttentionWeights, fold, start_from_slots
from tests.conftest import make_pruner
from tests.fickle import Fickle

pytestmark = pytest.mark.usefixtures("library")


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers: transposed in memory, between others, batch innermost."""
    between = torch.cat([x[:, :1], x, x[:, :1]], dim=1)[:, 1:-1]
    wider = torch.cat([x, x[..., :3]], dim=-1)[..., : x.shape[-1]]
    return [x.mT.contiguous().mT, between, wider, x.movedim(0, -1).contiguous().movedim(-1, 0)]


def weights() -> SlotAttentionWeights:
    return SlotAttentionWeights(*(weight.detach() for weight in make_pruner().weights()))


def test_a_fickle_library_is_fickle() -> None:
    x, w = torch.randn(3, 65, 48), torch.randn(65, 48)
    with Fickle():
        want = torch.nn.functional.linear(x, w)
        assert torch.equal(torch.nn.functional.linear(x, w), want)
        assert not torch.equal(torch.nn.functional.linear(x.mT.contiguous().mT, w), want)
        assert not torch.equal(torch.nn.functional.linear(x[:1], w), want[:1])
        assert torch.allclose(torch.nn.functional.linear(x[:1], w), want[:1], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_start_of_slots(dtype: torch.dtype) -> None:
    folded = fold(weights(), dtype)
    slots = torch.randn(3, 65, 32)
    want = start_from_slots(slots, folded)
    for image in range(3):
        alone = start_from_slots(slots[image : image + 1], folded)
        assert all(torch.equal(a, b[image : image + 1]) for a, b in zip(alone, want, strict=True))
    for view in layouts(slots):
        got = start_from_slots(view, folded)
        assert all(map(torch.equal, got, want))
        assert all(t.is_contiguous() for t in got)
    shared = start_from_slots(slots[:1].expand(3, -1, -1), folded)
    assert all(torch.equal(a, b[:1].expand_as(a)) for a, b in zip(shared, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_folded_weights(dtype: torch.dtype) -> None:
    """To the bit in float64, before anything is rounded."""
    plain = weights()
    transposed = SlotAttentionWeights(*(w.T.contiguous().T if w.ndim == 2 else w for w in plain))
    assert all(map(torch.equal, fold(transposed, dtype), fold(plain, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
def test_received_attention(dtype: torch.dtype, given: bool) -> None:
    qkv = torch.randn(3, 157, 3, 4, 20).to(dtype)  # as a fused projection leaves them
    q, k = (qkv[:, :, i].transpose(1, 2) for i in range(2))
    lse = torch.randn(3, 4, 157) + 5.0 if given else None
    want = received_attention(q, k, lse=lse)
    assert torch.equal(received_attention(q.contiguous(), k.contiguous(), lse=lse), want)
    assert torch.equal(received_attention(q.mT.contiguous().mT, k.mT.contiguous().mT, lse=lse), want)
    for image in range(3):
        at = slice(image, image + 1)
        alone = received_attention(q[at], k[at], lse=None if lse is None else lse[at])
        assert torch.equal(alone, want[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rounds", [0, 2])
def test_coverage_of_any_layout(rounds: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 100, 20).to(dtype)
    kept = torch.stack([torch.randperm(100)[:9].sort().values for _ in range(3)])
    want = refine_measured(x, kept, rounds)
    for view in layouts(x):
        assert all(map(torch.equal, refine_measured(view, kept, rounds), want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merging(dtype: torch.dtype) -> None:
    x, compare = torch.randn(3, 100, 20).to(dtype), torch.randn(3, 100, 6).round().to(dtype)  # many near ties
    kept = torch.stack([torch.randperm(100)[:9].sort().values for _ in range(3)])
    want = merge_tokens(x, kept, compare)
    for views in zip(layouts(x), layouts(compare), strict=True):
        assert all(map(torch.equal, merge_tokens(views[0], kept, views[1]), want))
    for image in range(3):
        at = slice(image, image + 1)
        assert all(map(torch.equal, merge_tokens(x[at], kept[at], compare[at]), (t[at] for t in want)))


def test_laid_out_copies_once_or_not_at_all() -> None:
    x = torch.randn(2, 3, 4)
    assert laid_out(x) is x
    for view in layouts(x):
        for dtype in (None, torch.float64):
            assert laid_out(view, dtype).is_contiguous()
            assert torch.equal(laid_out(view, dtype), x.to(dtype or x.dtype))


def test_images_one_by_one() -> None:
    x, shared, seen = torch.randn(3, 2), torch.randn(1, 2), []

    def function(
        x: torch.Tensor, shared: torch.Tensor, none: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert none is None
        seen.append(len(x))
        return x + shared, x

    got = image_by_image(function, x, shared, None)
    assert torch.equal(got[0], x + shared)
    assert torch.equal(got[1], x)
    assert seen == [1, 1, 1]
