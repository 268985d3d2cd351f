"""A hundred questions to the shipped model: a selection that is broken answers too few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.accuracy import gate, testset
from bench.accuracy.answers import correct
from bench.accuracy.cases import Case
from bench.accuracy.loading import ASSETS, MODEL, load_model
from bench.accuracy.selectors import Selector, in_consumed, ours, rivals
from bench.accuracy.standing import BOTH, PLAIN, Mode, Standing
from ocvtp import OCPruner

KEEP = 28  # 11 % of 256
PICTURES, QUESTIONS = 20, 5
# Measured on these questions: 0.97 with all tokens, 0.94 with ours, 0.63 to 0.65 with broken selections.
UNPRUNED, FLOOR, BROKEN = 0.93, 0.85, 0.75


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(MODEL, torch.device("cpu"))


@pytest.fixture(scope="module")
def pruner() -> OCPruner:
    return OCPruner.from_pretrained(str(ASSETS / "testbed-pruner")).float().eval()


@pytest.fixture(scope="module")
def test(loaded: tuple[Any, Any], pruner: OCPruner) -> testset.TestSet:
    model, processor = loaded
    words = processor.tokenizer.get_vocab()
    return testset.build(model, words, "test", PICTURES, QUESTIONS, [pruner.config.layer])


def test_the_model_sees(loaded: tuple[Any, Any], test: testset.TestSet) -> None:
    right = correct(loaded[0], test)
    assert len(right) == 100
    assert right.mean() >= UNPRUNED
    another = correct(loaded[0], test, test.projected.roll(1, 0))
    assert another.mean() < 0.6  # of another picture: what can be guessed


def test_eleven_percent_of_the_tokens_are_enough_for_most(
    loaded: tuple[Any, Any], test: testset.TestSet, pruner: OCPruner
) -> None:
    """The product's own generate, against the harness, and the harness against the floor."""
    model, processor = loaded
    selector = ours({"": pruner})[0]
    assert kept_right(model, test, selector).mean() >= FLOOR
    assert gate.check(model, processor, test, [Case(selector, pruner, KEEP)]) == 100


def kept_right(model: Any, test: testset.TestSet, selector: Selector, mode: Mode = PLAIN) -> Any:
    return correct(model, test, *Standing(model, test, selector.choose(test, KEEP, 0)).seen(mode))


def test_the_rule_that_compares_features_is_the_rival(
    loaded: tuple[Any, Any], test: testset.TestSet, pruner: OCPruner
) -> None:
    model, processor = loaded
    farthest = next(each for each in rivals(pruner.config.layer) if each.name == "farthest point")
    assert kept_right(model, test, farthest).mean() >= FLOOR
    early = {"features": pruner.config.layer}
    assert gate.check(model, processor, test, [Case(farthest, "farthest_point", KEEP, PLAIN, early)]) == 100


def test_standing_for_the_others_is_what_the_product_does(
    loaded: tuple[Any, Any], test: testset.TestSet, pruner: OCPruner
) -> None:
    """The words of ``generate``, and nearly as many right as with all tokens."""
    model, processor = loaded
    best = next(each for each in rivals(pruner.config.layer) if each.name == in_consumed("greedy DPP"))
    case = Case(best, "greedy_dpp", KEEP, BOTH, {"features": "consumed"})
    assert gate.check(model, processor, test, [case]) == 100
    assert kept_right(model, test, best, BOTH).mean() >= UNPRUNED


@pytest.mark.parametrize("how", ["another picture's", "shuffled over the picture", "next door"])
def test_a_broken_selection_falls_below_the_floor(
    loaded: tuple[Any, Any], test: testset.TestSet, pruner: OCPruner, how: str
) -> None:
    def broken(test: testset.TestSet, keep: int, seed: int) -> torch.Tensor:
        kept = ours({"": pruner})[0].choose(test, keep, seed)
        if how == "another picture's":
            return kept.roll(1, 0)
        if how == "next door":  # a row too low
            return ((kept + 48) % 256).sort(1).values
        place = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
        return place[kept].sort(1).values

    assert kept_right(loaded[0], test, Selector(how, broken)).mean() < BROKEN
