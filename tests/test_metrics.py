"""Measures of kept tokens against brute force, and that nothing leaks into them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ocvtp import OCPruner, PrunerConfig, metrics
from ocvtp_kernels.coverage import coverage_error
from tests.conftest import SMALL, make_pruner
from tests.pruner.test_refine import clustered

TOKENS = 24


@pytest.fixture(scope="module")
def trained() -> OCPruner:
    """With a decoder; random, which these properties don't mind."""
    sizes = {**SMALL.to_dict(), "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_tokens": TOKENS}
    return make_pruner(PrunerConfig(**{**sizes, "feature_scale": 2.0}))


@pytest.fixture
def x() -> torch.Tensor:
    return clustered(3, TOKENS)


def some(keep: int) -> torch.Tensor:
    draw = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(0))
    return draw.argsort(dim=1)[:, :keep].sort(dim=1).values


def test_coverage_takes_a_selection_or_indices(x: torch.Tensor, trained: OCPruner) -> None:
    selection = trained(x, 6, coverage=True)
    assert torch.equal(metrics.coverage(x, selection), coverage_error(x, selection.indices))
    assert torch.equal(metrics.coverage(x, selection.indices), coverage_error(x, selection.indices))


@pytest.mark.parametrize("keep", [1, 5, 24])
def test_residual_is_least_squares(x: torch.Tensor, keep: int) -> None:
    indices = some(keep)
    got = metrics.least_squares_residual(x, indices)
    for image in range(3):
        wide = x[image].double()
        basis = wide[indices[image]].T  # [C, keep]
        left = wide.T - basis @ torch.linalg.lstsq(basis, wide.T).solution
        want = left.square().sum() / (wide - wide.mean(dim=0)).square().sum()
        assert float(got[image]) == pytest.approx(float(want), abs=1e-9)


def test_residual_of_kept_tokens_that_depend_on_each_other() -> None:
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    x[0, 1], x[0, 2] = 2 * x[0, 0], x[0, 0]
    alone, thrice = (metrics.least_squares_residual(x, torch.tensor([i])) for i in ([0], [0, 1, 2]))
    assert torch.allclose(alone, thrice)


def test_residual_never_exceeds_coverage_and_falls_with_more_tokens(x: torch.Tensor) -> None:
    residuals = [metrics.least_squares_residual(x, some(TOKENS)[:, :keep]) for keep in (2, 8, 16)]
    assert all((b <= a + 1e-12).all() for a, b in itertools.pairwise(residuals))
    assert (metrics.least_squares_residual(x, some(8)) <= metrics.coverage(x, some(8)) + 1e-6).all()


@pytest.mark.parametrize("weighted", [False, True])
class TestReconstruction:
    def test_what_was_left_out_does_not_leak(
        self, x: torch.Tensor, trained: OCPruner, weighted: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the tokens that were left out say, the decoder makes the same of those that were kept."""
        indices = some(6)
        other = torch.randn_like(x).scatter(
            1,
            indices[:, :, None].expand(-1, -1, x.shape[2]),
            x.gather(1, indices[:, :, None].expand(-1, -1, 48)),
        )
        rebuilt: list[torch.Tensor] = []
        decode = OCPruner.decode
        monkeypatch.setattr(
            OCPruner, "decode", lambda self, *a: rebuilt.append(decode(self, *a)) or rebuilt[-1]
        )
        for features in (x, other):
            metrics.reconstruction_error(trained, features, indices, weighted=weighted)
        assert torch.allclose(*rebuilt, atol=1e-5)

    def test_depends_on_what_is_kept_and_on_the_seed(
        self, x: torch.Tensor, trained: OCPruner, weighted: bool
    ) -> None:
        first = metrics.reconstruction_error(trained, x, some(6), weighted=weighted)
        assert first.shape == (3,)
        assert torch.equal(first, metrics.reconstruction_error(trained, x, some(6), weighted=weighted))
        assert not torch.equal(
            first, metrics.reconstruction_error(trained, x, some(6), seed=1, weighted=weighted)
        )
        assert not torch.equal(first, metrics.reconstruction_error(trained, x, some(7), weighted=weighted))

    def test_leaves_the_mode_alone(self, x: torch.Tensor, trained: OCPruner, weighted: bool) -> None:
        trained.train()
        eager = metrics.reconstruction_error(trained, x, some(6), weighted=weighted)
        assert trained.training
        trained.eval()
        assert torch.equal(eager, metrics.reconstruction_error(trained, x, some(6), weighted=weighted))
        assert not trained.training


def test_unweighted_error_by_hand(x: torch.Tensor, trained: OCPruner) -> None:
    indices = some(6)
    rows = x.gather(1, indices[:, :, None].expand(-1, -1, 48))
    hidden = torch.ones(3, TOKENS, dtype=torch.bool).scatter(1, indices, False)
    slots, _ = trained.slots(rows, 6)
    want = (trained.decode(x, slots, hidden) - x).square().sum(dim=(1, 2))
    want = want / (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    assert torch.allclose(metrics.reconstruction_error(trained, x, indices), want)


def test_images_of_equal_tokens_have_no_error() -> None:
    x = torch.ones(2, 9, 4)
    indices = torch.zeros(2, 1, dtype=torch.int64)
    assert metrics.coverage(x, indices).tolist() == [0, 0]
    assert metrics.least_squares_residual(x, indices).tolist() == [0, 0]


@pytest.mark.parametrize("measure", [metrics.coverage, metrics.least_squares_residual])
@pytest.mark.parametrize(
    ("kept", "error", "match"),
    [
        ([[0], [1], [2]], TypeError, "Selection or int64 indices"),
        (torch.zeros(3, 2), TypeError, "int64"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"\[B, T\]"),
        (torch.full((3, 2), TOKENS), ValueError, "indices of the 24 tokens"),
        (torch.full((3, 2), -1), ValueError, "indices of the 24 tokens"),
        (torch.zeros(3, 0, dtype=torch.int64), ValueError, "indices of the 24 tokens"),
    ],
)
def test_refused(x: torch.Tensor, measure: Any, kept: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        measure(x, kept)


def test_a_selection_of_other_images(x: torch.Tensor, trained: OCPruner) -> None:
    selection = trained(x, 6)
    with pytest.raises(ValueError, match="30 tokens per image, 24 were selected from"):
        metrics.coverage(clustered(3, 30), selection)


def test_a_pruner_without_a_decoder(x: torch.Tensor, pruner: OCPruner) -> None:
    with pytest.raises(ValueError, match="no decoder to rebuild with"):
        metrics.reconstruction_error(pruner, x, some(6))


def test_images_that_keep_different_numbers(x: torch.Tensor, trained: OCPruner) -> None:
    selection = trained(x, "auto", max_error=100.0, budgets=(2, 5))
    assert torch.equal(metrics.coverage(x, selection), metrics.coverage(x, selection.indices[:, :2]))
    with pytest.raises(ValueError, match="one at a time"):
        metrics.reconstruction_error(trained, x, selection)
