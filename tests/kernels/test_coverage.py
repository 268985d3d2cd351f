"""Coverage and refinement against brute force, and what they promise whatever the features."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ocvtp_kernels._nearest_reference import centred
from ocvtp_kernels.coverage import coverage_error, refine
from ocvtp_kernels.coverage.reference import candidates, cover


def kept_of(batch: int, tokens: int, keep: int, seed: int = 0) -> torch.Tensor:
    draw = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    return draw.argsort(dim=1)[:, :keep].sort(dim=1).values


def features(batch: int, tokens: int, width: int, kind: str = "normal", seed: int = 0) -> torch.Tensor:
    x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))
    if kind == "grid":  # many equal tokens, and tied distances
        return x.round()
    if kind == "far":  # a mean a thousand times the spread
        return x + 1000.0
    if kind == "equal":
        return torch.ones_like(x)
    return x


KINDS = ("normal", "grid", "far", "equal")


def squared_distances(x: torch.Tensor) -> torch.Tensor:
    return (x.double()[:, :, None] - x.double()[:, None]).square().sum(dim=3)


def brute_error(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    near = squared_distances(x).gather(2, indices[:, None].expand(-1, x.shape[1], -1)).amin(dim=2)
    total = (x.double() - x.double().mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return torch.where(total > 0, near.sum(dim=1) / total.clamp_min(1e-300), 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 7, 31])
def test_error_is_the_nearest_kept_tokens(kind: str, keep: int) -> None:
    x, indices = features(3, 31, 5, kind), kept_of(3, 31, keep)
    error = coverage_error(x, indices)
    assert error.dtype == torch.float32
    assert torch.allclose(
        error.double(), brute_error(x, indices), rtol=1e-3 if kind == "far" else 1e-5, atol=1e-7
    )
    assert torch.allclose(coverage_error(x.double(), indices), brute_error(x, indices), atol=1e-12)


def test_error_in_its_own_units() -> None:
    x, indices = features(2, 31, 5), kept_of(2, 31, 7)
    assert torch.allclose(coverage_error(20 * x + 3, indices), coverage_error(x, indices), rtol=1e-4)
    assert not coverage_error(x, kept_of(2, 31, 31)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_medoids(kind: str) -> None:
    """By brute force: no member of a cluster has a smaller sum of squared distances to its members."""
    x, indices = features(4, 31, 5, kind), kept_of(4, 31, 6)
    z = centred(x.double())
    owner = cover(z, indices).owner
    moved, between = candidates(z, indices, owner), squared_distances(x)
    for image in range(4):
        for cluster in range(6):
            members = (owner[image] == cluster).nonzero()[:, 0]
            sums = between[image][members][:, members].sum(dim=0)
            chosen = (members == moved[image, cluster]).nonzero()[0, 0]
            assert sums[chosen] <= sums.min() * (1 + 1e-4)
            own = (members == indices[image, cluster]).nonzero()[0, 0]
            if sums[own] <= sums.min() * (1 + 1e-9):  # nothing to win: it stays
                assert moved[image, cluster] == indices[image, cluster]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 2, 7, 30, 31])
def test_refinement_never_hurts(kind: str, keep: int, dtype: torch.dtype) -> None:
    x, indices = features(3, 31, 5, kind).to(dtype), kept_of(3, 31, keep)
    before, moved = coverage_error(x, indices), []
    for rounds in (1, 2, 5):
        refined = refine(x, indices, rounds)
        error = coverage_error(x, refined)
        assert (error <= before).all()
        assert refined.shape == indices.shape
        assert refined.dtype == torch.int64
        assert (refined.diff(dim=1) > 0).all()
        assert (refined >= 0).all()
        assert (refined < 31).all()
        before = error
        moved.append(not torch.equal(refined, indices))
    if keep == 7 and kind in ("normal", "far") and dtype != torch.float16:
        assert moved[0]


def test_refinement_ends_at_rest() -> None:
    x, indices = features(3, 60, 5), kept_of(3, 60, 8)
    rested = refine(x, indices, 60)
    assert torch.equal(refine(x, rested, 1), rested)
    assert torch.equal(refine(x, indices, 61), rested)


def test_order_of_the_kept_does_not_matter_where_nothing_is_tied() -> None:
    x, indices = features(2, 40, 5), kept_of(2, 40, 6)
    assert torch.equal(refine(x, indices.flip(1), 2), refine(x, indices, 2))


def test_known_clusters_are_found() -> None:
    """Three far-apart groups, two kept tokens in one of them: rounds move within groups, not between."""
    centres = torch.tensor([0.0, 100.0, 200.0]).repeat_interleave(5)
    offsets = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).repeat(3)
    x = (centres + offsets)[None, :, None]
    assert refine(x, torch.tensor([[0, 9, 14]]), 1).tolist() == [[2, 7, 12]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("x", "indices", "rounds", "error", "match"),
    [
        (torch.ones(2, 9, 3).long(), kept_of(2, 9, 2), 1, TypeError, "floating point"),
        (torch.ones(2, 9), kept_of(2, 9, 2), 1, ValueError, r"\[B, N, C\]"),
        (torch.ones(2, 9, 3), kept_of(2, 9, 2).float(), 1, TypeError, "int64"),
        (torch.ones(2, 9, 3), kept_of(3, 9, 2), 1, ValueError, r"\[B, T\]"),
        (torch.ones(2, 9, 3), kept_of(2, 11, 10), 1, ValueError, "between 1 and N"),
        (torch.ones(2, 9, 3), kept_of(2, 9, 2)[:, :0], 1, ValueError, "between 1 and N"),
        (torch.ones(0, 9, 3), kept_of(0, 9, 2), 1, ValueError, "between 1 and N"),
        (torch.ones(2, 9, 3), kept_of(2, 9, 2), -1, ValueError, "between 0 and 100"),
        (torch.ones(2, 9, 3), kept_of(2, 9, 2), 1.0, TypeError, "int"),
    ],
)
def test_refused(x: Any, indices: Any, rounds: Any, error: type, match: str, backend: str) -> None:
    with pytest.raises(error, match=match):
        refine(x, indices, rounds, backend=backend)
