"""Refinement of what a pruner keeps: coverage that never rises, in every way a selection is made."""

from __future__ import annotations

import itertools

import pytest
import torch

from ocvtp import OCPruner
from ocvtp.pruner.capture import SlotRunner
from ocvtp_kernels.coverage import coverage_error, refine
from tests.conftest import make_pruner
from tests.rehearsal import Rehearsal


def clustered(batch: int, tokens: int, width: int = 48, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(batch, 6, width, generator=draw)
    which = torch.randint(6, (batch, tokens, 1), generator=draw).expand(-1, -1, width)
    return centres.gather(1, which) + torch.randn(batch, tokens, width, generator=draw)


X = clustered(3, 40)


def test_none_is_as_published(pruner: OCPruner) -> None:
    plain, asked = pruner(X, 7), pruner(X, 7, refine=0)
    assert torch.equal(plain.indices, asked.indices)
    assert plain.coverage is None


@pytest.mark.parametrize("keep", [1, 7, 40])
def test_coverage_never_rises_and_falls_with_rounds(pruner: OCPruner, keep: int) -> None:
    errors = [pruner(X, keep, refine=rounds, coverage=True).coverage for rounds in (0, 1, 2, 5)]
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(errors))
    if keep == 7:
        assert (errors[-1] < errors[0]).all()
    if keep == 40:
        assert not errors[0].any()


def test_it_is_the_kernels_refinement(pruner: OCPruner) -> None:
    plain, refined = pruner(X, 7), pruner(X, 7, refine=2, coverage=True)
    assert torch.equal(refined.indices, refine(X, plain.indices, 2))
    assert torch.equal(refined.from_slots, plain.from_slots)  # of the selection that was refined
    assert torch.allclose(refined.coverage, coverage_error(X, refined.indices))
    assert (refined.indices.diff(dim=1) > 0).all()


def test_coverage_alone_moves_nothing(pruner: OCPruner) -> None:
    selection = pruner(X, 7, coverage=True)
    assert torch.equal(selection.indices, pruner(X, 7).indices)
    assert torch.allclose(selection.coverage, coverage_error(X, selection.indices))


def test_assign_then_select(pruner: OCPruner) -> None:
    scores, rows = torch.rand(3, 40), torch.randn(3, 40, 5)
    want = pruner(X, 7, scores, refine=2, coverage=True)
    assigned = pruner.assign(X, 7, refine=2, coverage=True)
    for selection in (assigned.select(scores), assigned.select_rows(scores, rows)[0]):
        assert torch.equal(selection.indices, want.indices)
        assert torch.equal(selection.coverage, want.coverage)
    assert torch.equal(assigned.select_rows(scores, rows)[1], want.gather(rows))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bits_do_not_depend_on_the_batch(pruner: OCPruner, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    together = pruner(X, 7, refine=1, coverage=True, backend=backend)
    for i in range(3):
        alone = pruner(X[i : i + 1], 7, refine=1, coverage=True, backend=backend)
        assert torch.equal(alone.indices[0], together.indices[i])
        assert torch.equal(alone.coverage[0], together.coverage[i])


def test_captured_slot_loops_are_refined_too(lanes: list[Rehearsal]) -> None:
    pytest.importorskip("triton")
    pruner, runner = make_pruner(), SlotRunner()
    scores = torch.rand(3, 40)
    options = {"backend": "triton", "precision": "fp32"}
    for features in (X, clustered(3, 40, seed=1), clustered(3, 40, seed=2)):  # plain, captured, replayed
        for rounds in (2, 0):  # one graph serves both
            want = pruner(features, 7, scores, refine=rounds, **options)
            begun = runner.begin(pruner, features, 7, refine=rounds, **options)
            assert torch.equal(begun.get().select(scores).indices, want.indices)
    assert runner.graphs == 1


def test_float64_features(pruner: OCPruner) -> None:
    wide = make_pruner().double()
    assert torch.equal(
        wide(X.double(), 7, refine=1).indices, refine(X.double(), wide(X.double(), 7).indices, 1)
    )


@pytest.mark.parametrize(
    ("rounds", "error", "match"),
    [
        (-1, ValueError, "between 0 and 100"),
        (101, ValueError, "100"),
        (True, TypeError, "int"),
        (1.0, TypeError, "int"),
    ],
)
def test_rounds_that_make_no_sense(pruner: OCPruner, rounds: object, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        pruner(X, 7, refine=rounds)
    with pytest.raises(error, match=match):
        pruner.assign(X, 7, refine=rounds)
