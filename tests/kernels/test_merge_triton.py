"""The kernels of merging against float64, with everything around them poisoned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels import BackendUnavailableError, _nearest
from ocvtp_kernels.merge import merge_by, merge_tokens, nearest_kept, op
from ocvtp_kernels.merge import triton as kernels
from tests.kernels.test_coverage import KINDS, features, kept_of
from tests.kernels.test_merge import SHAPES, counts, exact, masked, means, owners
from tests.kernels.triton_device import (
    DEVICE,
    NEAREST,
    PoisonedTorch,
    coarse_tiles,
    far_apart,
    interpreter_only,
    on_device,
    rounded,
    surrounded,
)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    sizes = {
        **NEAREST,
        "merge.line_up": {"BT": 8, "BN": 32},
        "merge.average": {"BN": 4, "BC": 16},
        "merge.spread": {"BN": 32, "BC": 16},
    }
    coarse_tiles(monkeypatch, request, sizes)


def assert_exact(x: torch.Tensor, owner: torch.Tensor, keep: int) -> None:
    """The reference's bits, and within its rounding of float64: sums are float32, in one order."""
    got = merge_by(x, owner, keep, backend="triton")
    assert torch.equal(got, rounded(merge_by(x.float(), owner, keep, backend="torch"), x.dtype))
    want = means(x.cpu(), owner.cpu(), keep).to(DEVICE)
    eps = torch.finfo(x.dtype).eps + x.shape[1] * torch.finfo(torch.float32).eps
    assert ((got.double() - want).abs() <= eps * x.double().abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width", "keep"), SHAPES)
def test_merges_into_the_nearest(batch: int, tokens: int, width: int, keep: int, dtype: torch.dtype) -> None:
    x, compare, indices = on_device(
        features(batch, tokens, width).to(dtype),
        features(batch, tokens, 21, seed=1),
        kept_of(batch, tokens, keep),
    )
    rows, mass, owner = merge_tokens(x, indices, compare, backend="triton")
    assert torch.equal(owner.cpu(), owners(compare.cpu(), indices.cpu()))
    assert torch.equal(mass.cpu(), counts(owner.cpu(), keep))
    assert torch.equal(rows, merge_by(x, owner, keep, backend="triton"))
    assert (rows.dtype, mass.dtype, owner.dtype) == (dtype, torch.float32, torch.int64)
    assert_exact(x, owner, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compares_the_tokens_themselves(kind: str, dtype: torch.dtype) -> None:
    """Nearest in float64, but for what rounding leaves open."""
    x, indices = on_device(features(3, 97, 18, kind).to(dtype), kept_of(3, 97, 20))
    owner, mass = nearest_kept(x, indices, backend="triton")
    z = x.double() - x.double().mean(dim=1, keepdim=True)
    between = torch.cdist(z, z).gather(2, indices[:, None].expand(-1, 97, -1))  # [B, N, T]
    got, least = between.gather(2, owner[:, :, None])[:, :, 0], between.amin(dim=2)
    assert (got <= least + 1e-3 * z.norm(dim=2).mean()).all()
    assert torch.equal(owner.gather(1, indices), torch.arange(20, device=DEVICE).expand(3, 20))
    assert (mass.sum(dim=1) == 97).all()
    if kind == "normal":
        assert torch.equal(owner, nearest_kept(x.double(), indices)[0])


@pytest.mark.parametrize("keep", [1, 9, 32])
def test_ties_go_to_the_lower_position_and_a_kept_token_to_itself(keep: int) -> None:
    compare, indices = on_device(exact(4, 32, 2), kept_of(4, 32, keep))
    owner, _ = nearest_kept(compare, indices, backend="triton")
    assert torch.equal(owner.cpu(), owners(compare.cpu(), indices.cpu()))


@pytest.mark.parametrize("keep", [1, 2, 9, 40])
def test_masked_ones_own_nothing(keep: int) -> None:
    x, indices, mask = on_device(features(4, 41, 5), *masked(4, 41, keep))
    rows, mass, owner = merge_tokens(x, indices, mask=mask, backend="triton")
    assert torch.equal(owner, nearest_kept(x.double(), indices, mask)[0])
    assert (mass > 0).equal(mask)
    assert not rows[~mask].any()
    for image, count in enumerate(mask.sum(dim=1).tolist()):
        alone = merge_tokens(x[image : image + 1], indices[image : image + 1, :count], backend="triton")
        assert torch.equal(alone.rows[0], rows[image, :count])
        assert torch.equal(alone.owner[0], owner[image])


def test_nothing_but_masked_ones() -> None:
    x, indices = on_device(features(2, 20, 5), kept_of(2, 20, 4))
    mask = torch.tensor([[True] * 4, [False] * 4], device=DEVICE)
    for backend in ("torch", "triton"):
        owner, mass = nearest_kept(x, indices, mask, backend=backend)
        assert not owner[1].any()
        assert mass[1].tolist() == [20, 0, 0, 0]


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("keep", [64, 66])
def test_the_tables_own_tiles(keep: int) -> None:
    x, indices = on_device(features(2, 70, 100), kept_of(2, 70, keep))
    rows, _, owner = merge_tokens(x, indices, backend="triton")
    assert torch.equal(owner, nearest_kept(x.double(), indices)[0])
    assert_exact(x, owner, keep)
    grad = torch.ones_like(rows)
    assert torch.equal(op.spread_rows(grad, owner, counts(owner.cpu(), keep).to(DEVICE)), shares(grad, owner))


def shares(grad: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """The gradient of the means, as the reference has it."""
    x = torch.zeros(*owner.shape, grad.shape[2], dtype=grad.dtype, device=DEVICE, requires_grad=True)
    rows = merge_by(x, owner, grad.shape[1], backend="torch")
    return torch.autograd.grad(rows, x, grad)[0]


def drawn_owner(batch: int, tokens: int, keep: int) -> torch.Tensor:
    """Half of all tokens are the first's; the last has none, if there is another."""
    draw = torch.Generator().manual_seed(tokens)
    owner = torch.randint(-keep, keep, (batch, tokens), generator=draw)
    return owner.clamp(0, max(keep - 2, 0)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width", "keep"), SHAPES)
def test_means_and_their_gradient_by_any_owner(
    batch: int, tokens: int, width: int, keep: int, dtype: torch.dtype
) -> None:
    (x,), owner = on_device(features(batch, tokens, width).to(dtype)), drawn_owner(batch, tokens, keep)
    assert_exact(x, owner, keep)
    leaf = x.clone().requires_grad_()
    rows = merge_by(leaf, owner, keep, backend="triton")
    if keep > 1:
        assert not rows[:, -1].any()
    (grad,) = on_device(features(batch, keep, width, seed=2).to(dtype))
    (found,) = torch.autograd.grad(rows, leaf, grad)
    assert torch.equal(found, rounded(shares(grad.float(), owner), dtype))


def test_gradient_differentiates_again() -> None:
    (x,), owner = on_device(features(2, 12, 3)), drawn_owner(2, 12, 4)
    seen = []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        rows = merge_by(leaf, owner, 4, backend=backend)
        (first,) = torch.autograd.grad(rows.pow(3).sum(), leaf, create_graph=True)
        seen.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert torch.allclose(*seen, rtol=1e-5)


def test_gradient_is_of_x_alone() -> None:
    x, indices = on_device(features(2, 12, 3), kept_of(2, 12, 4))
    compare = x.clone().requires_grad_()
    merged = merge_tokens(x, indices, compare, backend="triton")
    assert not any(t.requires_grad for t in merged)
    leaf = x.clone().requires_grad_()  # compared as well
    rows, mass, owner = merge_tokens(leaf, indices, backend="triton")
    assert rows.requires_grad
    assert not mass.requires_grad
    (found,) = torch.autograd.grad(rows.sum(), leaf)
    assert torch.equal(found, shares(torch.ones_like(rows), owner))


def test_all_tokens_kept_is_the_identity() -> None:
    for dtype in (torch.float32, torch.float16):
        (x,) = on_device(features(2, 37, 19).to(dtype))
        rows, mass, owner = merge_tokens(x, torch.arange(37, device=DEVICE).expand(2, 37), backend="triton")
        assert torch.equal(rows, x)
        assert (mass == 1).all()
        assert torch.equal(owner, torch.arange(37, device=DEVICE).expand(2, 37))


def test_sums_do_not_overflow_half_precision() -> None:
    x = torch.full((1, 64, 3), 60000.0, device=DEVICE).half()
    owner = torch.zeros(1, 64, dtype=torch.int64, device=DEVICE)
    assert torch.equal(merge_by(x, owner, 1, backend="triton"), x[:, :1])


def test_bits_do_not_depend_on_the_batch() -> None:
    x, compare, indices, mask = on_device(features(4, 45, 9), features(4, 45, 20, seed=1), *masked(4, 45, 6))
    leaf = x.clone().requires_grad_()
    together = merge_tokens(leaf, indices, compare, mask, backend="triton")
    (grad,) = torch.autograd.grad(together.rows.square().sum(), leaf)
    for i in range(4):
        at, leaf = slice(i, i + 1), x[i : i + 1].clone().requires_grad_()
        alone = merge_tokens(leaf, indices[at], compare[at], mask[at], backend="triton")
        assert all(map(torch.equal, alone, (t[at] for t in together)))
        assert torch.equal(torch.autograd.grad(alone.rows.square().sum(), leaf)[0], grad[at])


def test_strides_and_surroundings() -> None:
    x, compare, indices, mask = on_device(features(2, 37, 11), features(2, 37, 20, seed=1), *masked(2, 37, 6))
    want = merge_tokens(x, indices, compare, mask, backend="triton")
    for change in (surrounded, lambda t: t.mT.contiguous().mT):
        got = merge_tokens(*map(change, (x, indices, compare, mask)), backend="triton")
        assert all(map(torch.equal, got, want))
    got = merge_tokens(
        *(t[:1].expand(2, *t.shape[1:]) for t in (x, indices, compare, mask)), backend="triton"
    )
    assert all(torch.equal(one, other[:1].expand_as(other)) for one, other in zip(got, want, strict=True))
    rows, mass, owner = want
    spread = kernels.spread_rows(rows, owner, mass)
    for change in (surrounded, lambda t: t.mT.contiguous().mT):
        assert torch.equal(kernels.spread_rows(*map(change, (rows, owner, mass))), spread)


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_32_bits(axis: int) -> None:
    shape = [2, 6, 3]
    shape[axis] = 5
    (x,), owner = on_device(features(*shape)), drawn_owner(shape[0], shape[1], 5)
    far = far_apart(x, axis)
    assert torch.equal(merge_by(far, owner, 5, backend="triton"), merge_by(x, owner, 5, backend="triton"))
    mass = torch.ones(shape[0], shape[1], device=DEVICE)
    assert torch.equal(kernels.spread_rows(far, owner, mass), kernels.spread_rows(x, owner, mass))


def test_writes_all_of_its_memory_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices, mask = on_device(features(3, 37, 11), *masked(3, 37, 6))

    def everything() -> list[torch.Tensor]:
        merged = merge_tokens(x, indices, mask=mask, backend="triton")
        return [*merged, kernels.spread_rows(merged.rows, merged.owner, merged.mass)]

    want = everything()
    poisoned: Any = PoisonedTorch()
    for module in (kernels, _nearest):
        monkeypatch.setattr(module, "torch", poisoned)
    assert all(map(torch.equal, everything(), want))
    poisoned.assert_guards_intact()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_where_it_belongs(value: float) -> None:
    x, compare, indices = on_device(features(3, 20, 5), features(3, 20, 4, seed=1), kept_of(3, 20, 4))
    want = merge_tokens(x, indices, compare, backend="triton")
    x[1, 7, 2] = value
    rows = merge_tokens(x, indices, compare, backend="triton").rows
    spoiled = torch.zeros_like(rows, dtype=torch.bool)
    spoiled[1, want.owner[1, 7], 2] = True
    assert not rows[spoiled].isfinite().any()
    assert torch.equal(rows[~spoiled], want.rows[~spoiled])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_comparing_what_is_no_number(value: float) -> None:
    compare, indices, mask = on_device(features(3, 20, 5), *masked(3, 20, 6))
    want = nearest_kept(compare, indices, mask, backend="triton")
    compare[1, 7, 2] = value
    owner, mass = nearest_kept(compare, indices, mask, backend="triton")
    assert torch.equal(owner[[0, 2]], want[0][[0, 2]])
    assert torch.equal(owner, nearest_kept(compare, indices, mask, backend="torch")[0])
    assert mask[1][owner[1]].all()
    assert mass[1].sum() == 20


def test_kept_twice_belongs_to_the_first() -> None:
    (x,) = on_device(features(1, 12, 5))
    rows, mass, owner = merge_tokens(x, torch.tensor([[3, 3, 5]], device=DEVICE), backend="triton")
    want = merge_tokens(x, torch.tensor([[3, 5]], device=DEVICE), backend="triton")
    assert torch.equal(rows[:, [0, 2]], want.rows)
    assert not rows[0, 1].any()
    assert mass[0, 1] == 0
    assert owner[0, 3] == 0


def test_out_of_range_reads_and_writes_nothing_foreign() -> None:
    """Not allowed, but no reason to touch memory that is not ours."""
    x = surrounded(features(1, 12, 5).to(DEVICE))
    for bad in ([3, 5, 99], [-1, 3, 5], [3, 5, 2**32 + 7]):
        rows, mass, owner = merge_tokens(x, torch.tensor([bad], device=DEVICE), backend="triton")
        real = torch.tensor([0 <= index < 12 for index in bad], device=DEVICE)
        assert (mass[0] > 0).equal(real)
        assert rows.isfinite().all()
        assert real[owner[0]].all()
    owner = torch.tensor([[0, 3, -1, 1, 2, 99, 0, 1, 2, -5, 4, 0]], device=DEVICE)
    inside = (owner >= 0) & (owner < 3)
    rows, mass = op.merge_by(x, owner, 3)
    assert mass.tolist() == [[3, 2, 2]]
    assert torch.allclose(rows[0, 1], x[0, [3, 7]].mean(dim=0))
    share = op.spread_rows(torch.ones_like(rows), owner, mass)
    assert (share[0, :, 0] > 0).equal(inside[0])


@interpreter_only
def test_float64_needs_pytorch() -> None:
    x, indices = features(1, 9, 3), kept_of(1, 9, 2)
    calls = (
        lambda: merge_tokens(x.double(), indices, x, backend="triton"),
        lambda: merge_tokens(x, indices, x.double(), backend="triton"),
        lambda: nearest_kept(x.double(), indices, backend="triton"),
        lambda: merge_by(x.double(), torch.zeros(1, 9, dtype=torch.int64), 2, backend="triton"),
    )
    for call in calls:
        with pytest.raises(BackendUnavailableError, match=r"merge can't run.*not torch\.float64"):
            call()
