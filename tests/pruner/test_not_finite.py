"""Images with NaN or Inf: refused, or left a grid of tokens; in either case alone, and a GPU goes on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from ocvtp import OCPruner
from ocvtp.methods import attention_top_k, farthest_point, greedy_dpp, grid, k_medoids
from ocvtp.pruner.capture import SlotRunner
from ocvtp.selection import Selection
from tests.conftest import SMALL, make_pruner
from tests.far import FarLine
from tests.rehearsal import Rehearsal

TOKENS, KEEP = 36, 7
EVEN = grid(torch.empty(1, TOKENS, 1), KEEP).indices[0]
#: Ways to ask; of "scores", NaN is among the fill scores, else among the features.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scores": {},
    "map": {"return_attention": True},
    "refined": {"refine": 2, "coverage": True},
    "farthest": {"fill": "farthest_point", "num_slots": 5},
    "at once": {"batch_invariant": False},
}
BACKENDS = ["torch", "triton"]


def features(images: int = 3) -> torch.Tensor:
    return torch.randn(images, TOKENS, SMALL.in_dim, generator=torch.Generator().manual_seed(0))


def scores(images: int = 3) -> torch.Tensor:
    return torch.rand(images, TOKENS, generator=torch.Generator().manual_seed(1))


def spoilt(tensor: torch.Tensor, value: float = torch.nan) -> torch.Tensor:
    """With one number of image 1 that is none."""
    tensor = tensor.clone()
    tensor[1].view(-1)[-3] = value
    return tensor


@pytest.fixture
def small() -> OCPruner:
    return make_pruner(replace(SMALL, num_iters=2))


def asked(pruner: OCPruner, name: str, backend: str, *, bad: bool, **more: Any) -> Selection:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("for the interpreter")
        more["precision"] = "fp32"
    x, fill = features(), scores()
    if bad:
        x, fill = (x, spoilt(fill)) if name == "scores" else (spoilt(x), fill)
    return pruner(x, KEEP, fill, backend=backend, **CALLS[name], **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_grid_for_it_and_the_same_bits_for_the_others(
    name: str, backend: str, small: OCPruner, caplog: pytest.LogCaptureFixture
) -> None:
    clean = asked(small, name, backend, bad=False)
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        got = asked(small, name, backend, bad=True, on_invalid="grid")
    assert torch.equal(got.indices[1], EVEN)
    assert got.from_slots.tolist() == [clean.from_slots[0], -1, clean.from_slots[2]]
    for one, other in ((got.indices, clean.indices), (got.coverage, clean.coverage)):
        if one is not None and other is not None:
            assert torch.equal(one[[0, 2]], other[[0, 2]])
    if name == "refined":
        assert got.coverage is not None
        assert got.coverage[1].isnan()
    with pytest.raises(ValueError, match="NaN or Inf"):
        asked(small, name, backend, bad=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_whatever_it_is(value: float, small: OCPruner) -> None:
    got = small(spoilt(features(), value), KEEP, on_invalid="grid")
    assert torch.equal(got.indices[1], EVEN)
    assert (got.from_slots < 0).tolist() == [False, True, False]
    got = small(features(), KEEP, spoilt(scores(), value), on_invalid="grid")
    assert torch.equal(got.indices[1], EVEN)
    assert (got.from_slots < 0).tolist() == [False, True, False]


def test_the_warning_comes_once_a_pruner(caplog: pytest.LogCaptureFixture) -> None:
    pruner = make_pruner()
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        for _ in range(3):
            pruner(spoilt(features()), KEEP, on_invalid="grid")
    assert len(caplog.records) == 1
    assert "image [1] of 3: tokens spread evenly are kept" in caplog.text


@pytest.mark.filterwarnings("ignore:.*images miss max_error")
def test_budgets_of_their_own(small: OCPruner) -> None:
    options: dict[str, Any] = {"keep": "auto", "budgets": [3, KEEP], "max_error": 0.6}
    clean = small(features(), **options)
    got = small(spoilt(features()), on_invalid="grid", **options)
    assert torch.equal(got.indices[1], EVEN)
    assert got.from_slots[1] == -1
    assert torch.equal(got.indices[[0, 2]], clean.indices[[0, 2]])
    with pytest.raises(ValueError, match="NaN or Inf"):
        small(spoilt(features()), **options)


def test_rows_are_the_grids(small: OCPruner) -> None:
    x = features()
    pytest.importorskip("triton")
    for backend in BACKENDS[: 1 if torch.cuda.is_available() else 2]:
        options: dict[str, Any] = {"backend": backend, "on_invalid": "grid"}
        assignment = small.assign(spoilt(x), KEEP, **options)
        selection, rows = assignment.select_rows(None, x)
        assert torch.equal(rows[1], x[1, EVEN])
        assert torch.equal(rows, selection.gather(x))


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "torch") for name in CALLS), ("plain", "triton"), ("scores", "triton")]
)
def test_far_away_the_next_call_raises(name: str, backend: str, small: OCPruner, far: FarLine) -> None:
    """Where values are on a GPU: the call itself goes on, and so does the pruner."""
    clean = asked(small, name, backend, bad=False)
    got = asked(small, name, backend, bad=True)
    assert got.from_slots[1] == -1
    assert torch.equal(got.indices[[0, 2]], clean.indices[[0, 2]])
    assert ((got.indices >= 0) & (got.indices < TOKENS)).all()
    asked(small, name, backend, bad=False)  # its flags are still under way
    far.arrive()
    with pytest.raises(
        ValueError, match=r"in an earlier call, image \[1\] of 3: features or fill scores contain NaN"
    ):
        asked(small, name, backend, bad=False)
    assert far.waits == 0


def test_asking_a_pruner(small: OCPruner, far: FarLine) -> None:
    pruner = small
    pruner.check()
    pruner(spoilt(features()), KEEP)
    with pytest.raises(ValueError, match=r"image \[1\] of 3"):
        pruner.check()
    pruner.check()
    make_pruner()(features(), KEEP)  # others know nothing of it
    pruner(features(), KEEP, noise=torch.full((1, KEEP, SMALL.slot_dim), torch.nan))
    with pytest.raises(ValueError, match="noise contains NaN"):
        pruner.check()


@pytest.mark.filterwarnings("ignore:.*images miss max_error")
def test_several_budgets_are_one_call(small: OCPruner, far: FarLine) -> None:
    pruner = small
    pruner(spoilt(features()), "auto", budgets=[3, KEEP], max_error=0.6)
    with pytest.raises(ValueError, match=r"^in this call"):
        pruner.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter")
def test_replayed_graphs_hold_no_assertion(lanes: list[Rehearsal], far: FarLine) -> None:
    pytest.importorskip("triton")
    pruner, runner = make_pruner(replace(SMALL, num_iters=2)), SlotRunner()
    options: dict[str, Any] = {"backend": "triton", "precision": "fp32"}
    want = runner.begin(pruner, features(), KEEP, **options).get().select()
    for _ in range(3):
        got = runner.begin(pruner, spoilt(features()), KEEP, **options).get().select()
        assert got.from_slots[1] == -1
        assert torch.equal(got.indices[[0, 2]], want.indices[[0, 2]])
    assert runner.graphs == 1
    far.arrive()
    with pytest.raises(ValueError, match=r"image \[1\] of 3"):
        runner.begin(pruner, features(), KEEP, **options)
    kept = runner.begin(pruner, spoilt(features()), KEEP, on_invalid="grid", **options).get().select()
    assert torch.equal(kept.indices[1], EVEN)
    assert torch.equal(kept.indices[[0, 2]], want.indices[[0, 2]])


RULES: dict[str, Any] = {
    "farthest_point": lambda x, **more: farthest_point(x, KEEP, **more),
    "greedy_dpp": lambda x, **more: greedy_dpp(x, KEEP, **more),
    "k_medoids": lambda x, **more: k_medoids(x, KEEP, rounds=2, **more),
    "attention_top_k": lambda x, **more: attention_top_k(x[:, :, 0], KEEP, **more),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, far: FarLine) -> None:
    x, bad = features(), features()
    bad[1, 4, 0] = torch.inf
    choose = RULES[rule]
    clean = choose(x)
    got = choose(bad, on_invalid="grid")
    assert torch.equal(got.indices[1], EVEN)
    assert got.from_slots.tolist() == [0, -1, 0]
    assert torch.equal(got.indices[[0, 2]], clean.indices[[0, 2]])
    flagged = choose(bad)
    assert flagged.from_slots.tolist() == [0, -1, 0]
    assert torch.equal(flagged.indices[[0, 2]], clean.indices[[0, 2]])
    far.arrive()
    with pytest.raises(
        ValueError, match=r"in an earlier call, image \[1\] of 3: (features|fill_scores) contains NaN"
    ):
        choose(x)
    assert torch.equal(choose(x).indices, clean.indices)


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_the_host(rule: str) -> None:
    bad = features()
    bad[1, 4, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        RULES[rule](bad)
    assert torch.equal(RULES[rule](bad, on_invalid="grid").indices[1], EVEN)
