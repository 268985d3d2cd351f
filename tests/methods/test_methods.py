"""Selectors without training: what each one promises, on sets small enough to work it out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from ocvtp import Selection, methods
from tests.conftest import SMALL, make_pruner
from tests.methods import rivals

Method = Callable[[torch.Tensor, int], Selection]
BY_FEATURES: dict[str, Method] = {
    name: getattr(methods, name)
    for name in ("random_tokens", "grid", "farthest_point", "greedy_dpp", "k_medoids")
}


def by_attention(features: torch.Tensor, keep: int) -> Selection:
    return methods.attention_top_k(features[:, :, 0], keep)


ALL: dict[str, Method] = {**BY_FEATURES, "attention_top_k": by_attention}
each = pytest.mark.parametrize("name", ALL)


def features(batch: int = 3, tokens: int = 49, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------- of all of them


def test_all_public_methods_are_tested() -> None:
    published = {name.rstrip("+") for name in rivals.ALL} | set(rivals.OTHERS)
    assert set(methods.__all__) == set(ALL) | published


@each
@pytest.mark.parametrize("keep", [1, 2, 7, 10, 48, 49])
def test_the_budget_is_met_with_distinct_ascending_tokens(name: str, keep: int) -> None:
    x = features()
    selection = ALL[name](x, keep)
    assert selection.indices.shape == (3, keep)
    assert selection.indices.dtype == torch.int64
    assert (selection.indices.diff(dim=1) > 0).all()
    assert ((selection.indices >= 0) & (selection.indices < 49)).all()
    assert selection.from_slots.tolist() == [0, 0, 0]
    assert selection.tokens == 49
    assert torch.equal(
        selection.gather(x), torch.stack([row[i] for row, i in zip(x, selection.indices, strict=True)])
    )


@each
def test_a_pruner_selects_in_the_same_form(name: str) -> None:
    x = features(2, 49, SMALL.in_dim)
    ours, theirs = make_pruner()(x, 10), ALL[name](x, 10)
    for field in ("indices", "from_slots"):
        mine, other = getattr(ours, field), getattr(theirs, field)
        assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)


@each
def test_repeatable_and_independent_of_the_rest_of_the_batch(name: str) -> None:
    x = features(5)
    whole = ALL[name](x, 12).indices
    assert torch.equal(whole, ALL[name](x.clone(), 12).indices)
    assert torch.equal(whole[:2], ALL[name](x[:2], 12).indices)
    alone = methods.random_tokens(x[3:4], 12, seed=3) if name == "random_tokens" else ALL[name](x[3:4], 12)
    assert torch.equal(whole[3:4], alone.indices)


@each
def test_copies_of_one_token_still_give_a_whole_budget(name: str) -> None:
    selection = ALL[name](torch.ones(2, 16, 4), 9)
    assert (selection.indices.diff(dim=1) > 0).all()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(name: str, dtype: torch.dtype) -> None:
    x = features().to(dtype)
    strided = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not strided.is_contiguous()
    expected = ALL[name](x.float() if dtype != torch.float64 else x, 11).indices
    assert torch.equal(ALL[name](strided, 11).indices, expected)


@each
def test_nothing_is_recorded_for_gradients_and_inputs_stay_as_they_are(name: str) -> None:
    x = features().requires_grad_()
    before = x.detach().clone()
    assert not ALL[name](x, 5).indices.requires_grad
    assert torch.equal(x.detach(), before)


@each
@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (0, ValueError, "keep must be between 1 and 49"),
        (50, ValueError, "keep must be between 1 and 49"),
        (2.0, TypeError, "keep must be an int"),
    ],
)
def test_wrong_budgets(name: str, keep: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ALL[name](features(), keep)


@pytest.mark.parametrize("name", BY_FEATURES)
def test_wrong_features(name: str) -> None:
    with pytest.raises(ValueError, match=r"features must have shape \[B, N, C\]"):
        ALL[name](torch.randn(49, 8), 5)
    with pytest.raises(TypeError, match="features must be floating point"):
        ALL[name](torch.ones(1, 49, 8, dtype=torch.int64), 5)


@pytest.mark.parametrize("name", ["farthest_point", "greedy_dpp", "k_medoids", "attention_top_k"])
def test_features_that_are_not_finite(name: str) -> None:
    x = features()
    x[1, 7, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        ALL[name](x, 5)


COMPARING = ["farthest_point", "greedy_dpp", "k_medoids"]


@pytest.mark.parametrize("name", COMPARING)
def test_autocast_around_the_call_changes_nothing(name: str) -> None:
    x = features(2, 100, 64) + 3.0
    expected = ALL[name](x, 24).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ALL[name](x, 24).indices, expected)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("scale", [2.0**90, 2.0**-110])
def test_features_whose_squares_are_out_of_range(name: str, scale: float) -> None:
    x = features(2, 100, 64)
    assert torch.equal(ALL[name](x * scale, 24).indices, ALL[name](x, 24).indices)
    x[0] *= scale  # images don't share a scale
    assert torch.equal(ALL[name](x, 24).indices[1], ALL[name](x[1:], 24).indices[0])


# --------------------------------------------------------------------------------------------- one by one


def test_random_tokens_are_as_random_as_they_should_be() -> None:
    x = torch.empty(4000, 10, 1)
    indices = methods.random_tokens(x, 3).indices
    counts = torch.bincount(indices.flatten(), minlength=10).double() / 4000
    assert (counts - 0.3).abs().max() < 0.04
    assert len({tuple(row) for row in indices.tolist()}) == 120  # all sets of 3 of 10
    again = methods.random_tokens(x, 3, seed=1).indices
    assert (again != indices).any(dim=1).double().mean() > 0.9


def test_random_tokens_follow_their_seed_alone() -> None:
    x = features()
    first = methods.random_tokens(x, 9, seed=5).indices
    torch.manual_seed(123)
    assert torch.equal(first, methods.random_tokens(x + 1, 9, seed=5).indices)
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(ValueError, match="seed must be an int"):
            methods.random_tokens(x, 9, seed=seed)


def test_a_grid_is_even() -> None:
    picture = torch.zeros(1, 16 * 16, 1)
    sixteen = methods.grid(picture, 16).indices[0]
    assert sorted({i // 16 for i in sixteen.tolist()}) == [2, 6, 10, 14]
    assert sorted({i % 16 for i in sixteen.tolist()}) == [2, 6, 10, 14]
    for keep in (3, 13, 28, 56, 84, 200, 255):
        rows = torch.bincount(methods.grid(picture, keep).indices[0] // 16, minlength=16)
        used = rows[rows > 0]
        assert used.max() - used.min() <= 1
        gaps = rows.nonzero()[:, 0].diff()
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_grid_of_other_shapes() -> None:
    wide = torch.zeros(2, 4 * 16, 1)
    indices = methods.grid(wide, 4, shape=(4, 16)).indices
    assert indices.tolist() == [[34, 38, 42, 46]] * 2 or len({i // 16 for i in indices[0].tolist()}) == 1
    tall = methods.grid(wide, 64, shape=(16, 4)).indices
    assert tall.tolist() == [list(range(64))] * 2
    with pytest.raises(ValueError, match=r"64 tokens are not 5 x 12 patches; give shape="):
        methods.grid(wide, 4, shape=(5, 12))
    with pytest.raises(ValueError, match="63 tokens are not 7 x 7 patches"):
        methods.grid(wide[:, :63], 4)


def test_farthest_point_on_a_line() -> None:
    x = torch.tensor([0.0, 1.0, 4.75, 5.25, 9.0, 10.0])[None, :, None].repeat(1, 1, 3)
    # No order of a sum rounds quarters. The mean is 5.0: of 4.75 and 5.25, as near, the first; then both
    # ends, then the middles.
    assert methods.farthest_point(x, 1).indices.tolist() == [[2]]
    assert methods.farthest_point(x, 2).indices.tolist() == [[2, 5]]
    assert methods.farthest_point(x, 3).indices.tolist() == [[0, 2, 5]]
    assert methods.farthest_point(x, 4).indices.tolist() == [[0, 1, 2, 5]]


def test_farthest_point_is_within_twice_the_least_radius() -> None:
    for seed in range(5):
        x = features(1, 12, 3, seed).double()
        distance = torch.cdist(x[0], x[0])

        def radius(kept: tuple[int, ...], distance: torch.Tensor = distance) -> float:
            return distance[:, list(kept)].amin(dim=1).max().item()

        best = min(radius(kept) for kept in itertools.combinations(range(12), 4))
        assert radius(tuple(methods.farthest_point(x, 4).indices[0].tolist())) <= 2 * best


def test_greedy_dpp_adds_the_token_of_the_largest_volume() -> None:
    x = features(1, 14, 6, 3).double()
    unit = torch.nn.functional.normalize(x[0], dim=1)
    kept = [0]
    for _ in range(4):
        volumes = {
            token: torch.linalg.det(unit[[*kept, token]] @ unit[[*kept, token]].T).item()
            for token in range(14)
            if token not in kept
        }
        kept.append(max(volumes, key=lambda token: volumes[token]))
        assert methods.greedy_dpp(x, len(kept)).indices[0].tolist() == sorted(kept)


def test_greedy_dpp_beyond_the_rank_keeps_each_token_once() -> None:
    x = features(2, 20, 3)
    first = methods.greedy_dpp(x, 3).indices.tolist()
    for keep in (4, 12, 20):
        kept = methods.greedy_dpp(x, keep).indices.tolist()
        for whole, three in zip(kept, first, strict=True):
            others = [token for token in range(20) if token not in three]
            assert whole == sorted(three + others[: keep - 3])


def test_k_medoids_find_clusters_that_farthest_points_miss() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = centres.repeat_interleave(20, dim=0) + 0.5 * torch.randn(60, 2, generator=generator)
    found = methods.k_medoids(x[None], 3).indices[0]
    assert sorted(i // 20 for i in found.tolist()) == [0, 1, 2]
    error, start = (
        torch.cdist(x, x[kept]).amin(dim=1).square().sum()
        for kept in (found, methods.farthest_point(x[None], 3).indices[0])
    )
    assert error < start
    # Medoids: the member nearest its cluster's mean.
    for cluster, medoid in enumerate(found.tolist()):
        members = x[20 * cluster : 20 * (cluster + 1)]
        nearest = (members - members.mean(dim=0)).square().sum(dim=1).argmin().item()
        assert medoid == 20 * cluster + nearest


def test_attention_top_k_prefers_the_first_of_equals() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.5], [3.0, 1.0, 2.0, 0.0, -1.0]])
    assert methods.attention_top_k(scores, 2).indices.tolist() == [[1, 2], [0, 2]]
    assert methods.attention_top_k(scores, 3).indices.tolist() == [[1, 2, 3], [0, 1, 2]]
    with pytest.raises(ValueError, match=r"scores must have shape \[B, N\]"):
        methods.attention_top_k(scores[0], 2)
