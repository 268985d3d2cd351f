"""Adaptive budgets: the smallest that covers an image well enough, in static shapes."""

from __future__ import annotations

import warnings

import pytest
import torch

from ocvtp import OCPruner
from tests.pruner.test_refine import clustered

BUDGETS = (2, 5, 9, 20)


def errors(pruner: OCPruner, x: torch.Tensor, **options: object) -> torch.Tensor:
    return torch.stack([pruner(x, b, coverage=True, **options).coverage for b in BUDGETS])  # [budgets, B]


@pytest.fixture
def x() -> torch.Tensor:
    easy, hard = clustered(2, 40, seed=3), torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(4))
    return torch.cat([easy, hard])


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_smallest_that_is_good_enough(pruner: OCPruner, x: torch.Tensor, rounds: int) -> None:
    every = errors(pruner, x, refine=rounds)
    limit = float(every[1:3].mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pruner(x, "auto", max_error=limit, budgets=BUDGETS, refine=rounds)
    assert found.indices.shape == found.mask.shape == (4, 20)
    assert len(set(found.count.tolist())) > 1
    for i in range(4):
        good = [b for b, error in zip(BUDGETS, every[:, i], strict=True) if error <= limit]
        budget = good[0] if good else BUDGETS[-1]
        alone = pruner(x[i : i + 1], budget, coverage=True, refine=rounds)
        assert found.count[i] == budget
        assert bool(found.met[i]) == bool(good)
        assert found.mask[i].tolist() == [True] * budget + [False] * (20 - budget)
        assert torch.equal(found.indices[i, :budget], alone.indices[0])
        assert (found.indices[i, budget:] == alone.indices[0, -1]).all()
        assert found.coverage[i] == alone.coverage[0]
        assert found.from_slots[i] == alone.from_slots[0]


def test_rows_of_padding_are_zero(pruner: OCPruner, x: torch.Tensor) -> None:
    found = pruner(x, "auto", max_error=10.0, budgets=BUDGETS)
    assert found.count.tolist() == [2] * 4
    rows = found.gather(x)
    assert rows.shape == (4, 20, 48)
    assert rows[:, :2].ne(0).any(dim=2).all()
    assert not rows[:, 2:].any()


def test_says_so_when_even_the_largest_misses(pruner: OCPruner, x: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="4 of 4 images miss max_error=0.0 even with 20 tokens"):
        found = pruner(x, "auto", max_error=0.0, budgets=BUDGETS)
    assert not found.met.any()
    assert found.count.tolist() == [20] * 4
    assert found.mask.all()


def test_error_is_met_exactly_at_its_own_value(pruner: OCPruner, x: torch.Tensor) -> None:
    limit = float(errors(pruner, x)[1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pruner(x, "auto", max_error=limit, budgets=BUDGETS).count[0] == 5


def test_fixed_budgets_have_no_mask(pruner: OCPruner, x: torch.Tensor) -> None:
    selection = pruner(x, 5)
    assert selection.mask is selection.count is selection.met is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"keep": "auto"}, ValueError, "needs max_error"),
        ({"keep": "auto", "max_error": 0.5}, ValueError, "budgets="),
        ({"keep": "auto", "budgets": (2, 5)}, ValueError, "needs max_error"),
        (
            {"keep": "auto", "max_error": float("nan"), "budgets": (2, 5)},
            ValueError,
            "max_error must be at least 0",
        ),
        ({"keep": "auto", "max_error": -0.1, "budgets": (2, 5)}, ValueError, "max_error must be at least 0"),
        ({"keep": "auto", "max_error": "low", "budgets": (2, 5)}, TypeError, "max_error must be a number"),
        ({"keep": "auto", "max_error": 0.5, "budgets": ()}, ValueError, "ascending ints"),
        ({"keep": "auto", "max_error": 0.5, "budgets": (5, 2)}, ValueError, "ascending ints"),
        ({"keep": "auto", "max_error": 0.5, "budgets": (2, 2)}, ValueError, "ascending ints"),
        ({"keep": "auto", "max_error": 0.5, "budgets": (2.0, 5)}, ValueError, "ascending ints"),
        ({"keep": "auto", "max_error": 0.5, "budgets": (2, 41)}, ValueError, "between 1 and 40"),
        ({"keep": "auto", "max_error": 0.5, "budgets": (0, 4)}, ValueError, "between 1 and 40"),
        ({"keep": "half"}, ValueError, 'number of tokens or "auto"'),
        ({"keep": 5, "max_error": 0.5}, ValueError, 'go with keep="auto"'),
        ({"keep": 5, "budgets": (2, 5)}, ValueError, 'go with keep="auto"'),
        (
            {"keep": "auto", "max_error": 0.5, "budgets": (2, 5), "return_attention": True},
            ValueError,
            "ask without it",
        ),
    ],
)
def test_arguments_that_make_no_sense(
    pruner: OCPruner, x: torch.Tensor, options: dict, error: type, match: str
) -> None:
    with pytest.raises(error, match=match):
        pruner(x, **options)


@pytest.mark.parametrize(("share", "count"), [(0.25, 10), (0.01, 1), (0.5, 20), (1.0, 40), (0.26, 10)])
def test_a_share_of_the_tokens(pruner: OCPruner, x: torch.Tensor, share: float, count: int) -> None:
    assert torch.equal(pruner(x, share).indices, pruner(x, count).indices)
    assert torch.equal(pruner.assign(x, share).select().indices, pruner(x, count).indices)
