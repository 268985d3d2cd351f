"""A hundred questions to the shipped model: a selection that is broken answers too few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.accuracy import gate, testset
from bench.accuracy.answers import correct
from bench.accuracy.loading import ASSETS, MODEL, load_model
from bench.accuracy.selectors import Selector, ours, rivals
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
    right = correct(loaded[0], test, None)
    assert len(right) == 100
    assert right.mean() >= UNPRUNED
    assert correct(loaded[0], test, None, shift=1).mean() < 0.6  # of another picture: what can be guessed


def test_eleven_percent_of_the_tokens_are_enough_for_most(
    loaded: tuple[Any, Any], test: testset.TestSet, pruner: OCPruner
) -> None:
    """The product's own generate, against the harness, and the harness against the floor."""
    model, processor = loaded
    selector = ours({"": pruner})[0]
    assert correct(model, test, selector.choose(test, KEEP, 0)).mean() >= FLOOR
    assert gate.check(model, processor, test, [(selector, pruner, {"refine": 0}, KEEP)]) == 100


def test_the_rule_that_compares_features_is_the_rival(
    loaded: tuple[Any, Any], test: testset.TestSet, pruner: OCPruner
) -> None:
    model, processor = loaded
    farthest = next(each for each in rivals(pruner.config.layer) if each.name == "farthest point")
    assert correct(model, test, farthest.choose(test, KEEP, 0)).mean() >= FLOOR
    assert gate.check(model, processor, test, [(farthest, "farthest_point", {}, KEEP)]) == 100


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

    right = correct(loaded[0], test, Selector(how, broken).choose(test, KEEP, 0))
    assert right.mean() < BROKEN
