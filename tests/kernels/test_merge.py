"""Merging against a readable Python retelling of the rule, and what it promises whatever the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ocvtp_kernels.merge import merge_by, merge_tokens, nearest_kept
from tests.kernels.test_coverage import KINDS, features, kept_of, squared_distances

SHAPES = [(1, 1, 1, 1), (2, 31, 5, 7), (3, 31, 1, 31), (2, 17, 3, 1), (1, 97, 40, 33)]


def exact(batch: int, tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, and a power of two of tokens: means, products and ties are exact in float32."""
    assert tokens & (tokens - 1) == 0
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (batch, tokens, width), generator=generator).float()


def masked(batch: int, tokens: int, keep: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept tokens and mask where the images keep from 1 to ``keep`` tokens, the last one repeated."""
    indices = kept_of(batch, tokens, keep, seed)
    count = torch.randint(1, keep + 1, (batch, 1), generator=torch.Generator().manual_seed(seed + 1))
    position = torch.arange(keep).expand(batch, keep)
    return indices.gather(1, position.minimum(count - 1)), position < count


def owners(compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The rule in words, in float64: its own if kept, else the nearest, else the lower position."""
    between = squared_distances(compare)
    found = torch.empty(compare.shape[:2], dtype=torch.int64)
    for image, kept in enumerate(indices.tolist()):
        real = [t for t in range(len(kept)) if mask is None or mask[image, t]]
        for token in range(compare.shape[1]):
            found[image, token] = min(
                real, key=lambda t: (kept[t] != token, float(between[image, token, kept[t]]), t)
            )
    return found


def means(x: torch.Tensor, owner: torch.Tensor, keep: int) -> torch.Tensor:
    """In float64, and zero where there is nothing to average."""
    found = torch.zeros(x.shape[0], keep, x.shape[2], dtype=torch.float64)
    for image in range(x.shape[0]):
        for t in range(keep):
            if (owner[image] == t).any():
                found[image, t] = x[image, owner[image] == t].double().mean(dim=0)
    return found


def counts(owner: torch.Tensor, keep: int) -> torch.Tensor:
    return torch.stack([torch.bincount(image, minlength=keep) for image in owner]).float()


@pytest.mark.parametrize(("batch", "tokens", "width", "keep"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_merges_into_the_nearest(
    kind: str, batch: int, tokens: int, width: int, keep: int, dtype: torch.dtype
) -> None:
    x, indices = features(batch, tokens, width, kind).to(dtype), kept_of(batch, tokens, keep)
    compare = features(batch, tokens, 6, seed=1)
    rows, mass, owner = merge_tokens(x, indices, compare)
    assert torch.equal(owner, owners(compare, indices))
    assert torch.equal(mass, counts(owner, keep))
    assert (mass.sum(dim=1) == tokens).all()
    assert (rows.dtype, mass.dtype, owner.dtype) == (dtype, torch.float32, torch.int64)
    assert torch.allclose(rows.double(), means(x, owner, keep), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("kind", ["normal", "far"])
def test_compares_the_tokens_themselves(kind: str) -> None:
    x, indices = features(3, 31, 5, kind), kept_of(3, 31, 7)
    merged = merge_tokens(x, indices)
    assert torch.equal(merged.owner, owners(x, indices))
    for one, other in zip(merged, merge_tokens(x, indices, x.clone()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keep", [1, 9, 32])
def test_ties_go_to_the_lower_position_and_a_kept_token_to_itself(keep: int) -> None:
    compare, indices = exact(4, 32, 2), kept_of(4, 32, keep)  # of 32 tokens at most 25 are distinct
    owner, _ = nearest_kept(compare, indices)
    assert torch.equal(owner, owners(compare, indices))
    assert torch.equal(owner.gather(1, indices), torch.arange(keep).expand(4, keep))


def test_equal_tokens() -> None:
    """All go to the first, but for the kept ones."""
    owner, mass = nearest_kept(torch.ones(1, 8, 3), torch.tensor([[2, 4, 7]]))
    assert owner.tolist() == [[0, 0, 0, 0, 1, 0, 0, 2]]
    assert mass.tolist() == [[6, 1, 1]]


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_masked_ones_own_nothing(keep: int) -> None:
    x, (indices, mask) = features(6, 31, 5), masked(6, 31, keep)
    rows, mass, owner = merge_tokens(x, indices, mask=mask)
    assert torch.equal(owner, owners(x, indices, mask))
    assert (mass > 0).equal(mask)
    assert not rows[~mask].any()
    assert (mass.sum(dim=1) == 31).all()
    for image, count in enumerate(mask.sum(dim=1).tolist()):  # as if the image were pruned alone
        alone = merge_tokens(x[image : image + 1], indices[image : image + 1, :count])
        assert torch.equal(alone.rows[0], rows[image, :count])
        assert torch.equal(alone.owner[0], owner[image])


def test_kept_twice_belongs_to_the_first() -> None:
    x = features(1, 12, 5)
    rows, mass, owner = merge_tokens(x, torch.tensor([[3, 3, 5]]))
    want = merge_tokens(x, torch.tensor([[3, 5]]))
    assert torch.equal(rows[:, [0, 2]], want.rows)
    assert not rows[0, 1].any()
    assert mass[0, 1] == 0
    assert owner[0, 3] == 0


def test_all_tokens_kept_is_the_identity() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = features(2, 31, 5).to(dtype)
        rows, mass, owner = merge_tokens(x, torch.arange(31).expand(2, 31))
        assert torch.equal(rows, x)
        assert (mass == 1).all()
        assert torch.equal(owner, torch.arange(31).expand(2, 31))


def test_groups_of_equal_tokens_come_back_to_the_bit() -> None:
    """The exactness that weights build on: n distinct rows, repeated, pruned to those n."""
    x = features(2, 7, 40)
    order = torch.stack([torch.cat([torch.arange(7), torch.randint(7, (25,))]) for _ in range(2)])
    repeated = x.gather(1, order[:, :, None].expand(-1, -1, 40))
    rows, mass, owner = merge_tokens(repeated, torch.arange(7).expand(2, 7))
    assert torch.equal(owner, order)
    assert torch.equal(mass, counts(order, 7))
    assert torch.allclose(rows, x, rtol=1e-6)


def test_sums_do_not_overflow_half_precision() -> None:
    x = torch.full((1, 64, 3), 60000.0).half()
    assert torch.equal(merge_by(x, torch.zeros(1, 64, dtype=torch.int64), 1), x[:, :1])


def test_what_is_no_number_stays_where_it_belongs() -> None:
    x, compare, indices = features(3, 20, 5), features(3, 20, 4, seed=1), kept_of(3, 20, 4)
    want = merge_tokens(x, indices, compare)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[1, 7, 2] = value
        rows = merge_tokens(bad, indices, compare).rows
        assert not rows[1, want.owner[1, 7], 2].isfinite()
        spoiled = torch.zeros_like(rows, dtype=torch.bool)
        spoiled[1, want.owner[1, 7], 2] = True
        assert torch.equal(rows[~spoiled], want.rows[~spoiled])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_comparing_what_is_no_number(value: float) -> None:
    """That image's tokens go anywhere but to masked ones; kept ones to themselves; others don't notice."""
    compare, (indices, mask) = features(3, 20, 5), masked(3, 20, 6)
    want = nearest_kept(compare, indices, mask)
    compare[1, 7, 2] = value
    owner, mass = nearest_kept(compare, indices, mask)
    assert torch.equal(owner[[0, 2]], want[0][[0, 2]])
    assert mask[1][owner[1]].all()
    assert torch.equal(owner[1, indices[1][mask[1]]], torch.arange(int(mask[1].sum())))
    assert mass[1].sum() == 20


def test_bits_depend_on_neither_batch_nor_strides() -> None:
    x, compare, indices = features(4, 45, 9).half(), features(4, 45, 20, seed=1), kept_of(4, 45, 6)
    want = merge_tokens(x, indices, compare)
    for i in range(4):
        at = slice(i, i + 1)
        assert all(map(torch.equal, merge_tokens(x[at], indices[at], compare[at]), (t[at] for t in want)))
    transposed = merge_tokens(x.mT.contiguous().mT, indices, compare.mT.contiguous().mT)
    assert all(map(torch.equal, transposed, want))


def test_means_by_any_owner() -> None:
    x = features(3, 31, 5)
    owner = torch.randint(0, 9, (3, 31), generator=torch.Generator().manual_seed(0))
    owner[owner == 4] = 5  # has no tokens
    rows = merge_by(x, owner, 9)
    assert torch.allclose(rows.double(), means(x, owner, 9), atol=1e-6)
    assert not rows[:, 4].any()


def test_gradient_is_the_owners_over_their_number() -> None:
    x, indices = features(2, 12, 3).double().requires_grad_(), kept_of(2, 12, 4)
    compare = features(2, 12, 3, seed=1).requires_grad_()
    rows, mass, owner = merge_tokens(x, indices, compare)
    grad = torch.randn_like(rows)
    found, of_compare = torch.autograd.grad(rows, (x, compare), grad, allow_unused=True)
    at = owner[:, :, None].expand(-1, -1, 3)
    assert torch.allclose(found, (grad / mass[:, :, None]).gather(1, at))
    assert of_compare is None
    assert not mass.requires_grad
    run: Callable[[torch.Tensor], torch.Tensor] = lambda x: merge_tokens(x, indices, compare).rows  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_autocast_changes_nothing() -> None:
    x, indices = features(2, 31, 5), kept_of(2, 31, 7)
    want = merge_tokens(x, indices)
    with torch.autocast("cpu"):
        assert all(map(torch.equal, merge_tokens(x, indices), want))


X, INDICES, OWNER = torch.ones(2, 9, 3), kept_of(2, 9, 2), torch.zeros(2, 9, dtype=torch.int64)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda b: merge_tokens(X.long(), INDICES, backend=b), TypeError, "x must be floating point"),
        (lambda b: merge_tokens(X[0], INDICES, backend=b), ValueError, r"\[B, N, C\]"),
        (lambda b: merge_tokens(X[:0], INDICES[:0], backend=b), ValueError, "must have an image"),
        (lambda b: merge_tokens(X, INDICES.float(), backend=b), TypeError, "indices must be int64"),
        (lambda b: merge_tokens(X, INDICES[:1], backend=b), ValueError, r"\[B, keep\]"),
        (lambda b: merge_tokens(X, INDICES[:, :0], backend=b), ValueError, "between 1 and N"),
        (lambda b: merge_tokens(X, kept_of(2, 11, 10), backend=b), ValueError, "between 1 and N"),
        (lambda b: merge_tokens(X, INDICES, X[:, :8], backend=b), ValueError, r"\[B, N, C2\]"),
        (lambda b: merge_tokens(X, INDICES, X.long(), backend=b), TypeError, "compare must be floating"),
        (lambda b: merge_tokens(X, INDICES, mask=INDICES, backend=b), TypeError, "mask must be bool"),
        (lambda b: merge_tokens(X, INDICES, mask=INDICES[:, :1] > 0, backend=b), ValueError, "mask must"),
        (lambda b: merge_tokens(X, INDICES, X.to("meta"), backend=b), ValueError, "on cpu"),
        (lambda b: nearest_kept(X[:, :, :0], INDICES, backend=b), ValueError, "must have an image"),
        (lambda b: merge_by(X, OWNER.int(), 2, backend=b), TypeError, "owner must be int64"),
        (lambda b: merge_by(X, OWNER[:, :8], 2, backend=b), ValueError, r"\[B, N\]"),
        (lambda b: merge_by(X, OWNER, 10, backend=b), ValueError, "keep must be between 1 and 9"),
        (lambda b: merge_by(X, OWNER, 2.0, backend=b), TypeError, "keep must be an int"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_refused(call: Any, error: type, match: str, backend: str) -> None:
    with pytest.raises(error, match=match):
        call(backend)
