"""The recipe, its schedule and its split: numbers that follow from nothing but arguments."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from ocvtp.training.recipe import Recipe
from ocvtp.training.schedule import warm_cosine
from ocvtp.training.split import split


def test_the_published_recipe_is_the_default() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.patience) == (30, 12, 5)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.clip) == (1e-3, 0.01, 1.0)
    assert recipe.slots == (16, 32, 64, 128)
    assert (recipe.warmup_epochs, recipe.validation_share) == (4, 0.05)


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(slots=(3, 5), truncate=False, autocast="bf16", any_visible=0.0)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 0}, "epochs must be an int of at least 1 and at most 1000000; got 0"),
        ({"batch_size": 2.0}, "batch_size must be an int"),
        ({"patience": True}, "patience"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0 and at most"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"clip": math.inf}, "clip"),
        ({"learning_rate": 10**400}, "learning_rate .* got an int of 1329 bits"),
        ({"validation_share": 1.5}, "validation_share must be a number of at least 0 and at most 1; got 1.5"),
        ({"visible": -0.1}, "visible"),
        ({"slots": ()}, "slots must be a list with a length of at least 1"),
        ({"slots": (8, 0)}, r"slots\[1\] must be an int"),
        ({"slots": 16}, "slots must be a list; got 16"),
        ({"slots": None}, "slots must be a list; got None"),
        ({"epochs": 10**12}, "epochs"),
        ({"slots": (True,)}, "slots"),
        ({"truncate": 1}, "truncate must be true or false"),
        ({"empty_slots": "none"}, "empty_slots"),
        ({"autocast": "fp8"}, "autocast"),
        ({"seed": -1}, "seed"),
    ],
)
def test_numbers_no_training_could_use(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recipe(**changes)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"Recipe: unknown field\(s\) 'lr'; there are: epochs"):
        Recipe.from_dict({"lr": 1e-3})


def test_schedule_warms_up_and_ends_at_the_final_rate() -> None:
    rates = [warm_cosine(step, 100, 10, 1e-3, 1e-8) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) <= 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(1e-8)
    assert rates[54] == pytest.approx(5e-4, rel=0.02)  # half the way down


@pytest.mark.parametrize(("steps", "warm"), [(1, 0), (1, 1), (3, 5), (5, 5)])
def test_schedule_of_short_runs(steps: int, warm: int) -> None:
    assert all(0 < warm_cosine(step, steps, warm, 1e-3, 1e-8) <= 1e-3 for step in range(steps))


class TestSplit:
    IMAGES = tuple(f"digest {i // 3}" for i in range(60))  # 20 photographs of three records

    def test_whole_photographs(self) -> None:
        train, held_out = split(self.IMAGES, 0.2, seed=0)
        assert sorted([*train, *held_out]) == list(range(60))
        assert {self.IMAGES[i] for i in train}.isdisjoint(self.IMAGES[i] for i in held_out)
        assert len(held_out) == 12

    def test_content_decides_not_order(self) -> None:
        _, held_out = split(self.IMAGES, 0.2, seed=0)
        _, backwards = split(self.IMAGES[::-1], 0.2, seed=0)
        assert {self.IMAGES[i] for i in held_out} == {self.IMAGES[::-1][i] for i in backwards}

    def test_seeds_differ(self) -> None:
        assert split(self.IMAGES, 0.2, seed=0) != split(self.IMAGES, 0.2, seed=1)

    def test_at_least_one_is_held_out(self) -> None:
        assert len(split(self.IMAGES, 0.0, seed=0)[1]) == 3

    @pytest.mark.parametrize(("images", "share"), [(("one",) * 9, 0.05), (("one", "two"), 1.0)])
    def test_too_few(self, images: tuple[str, ...], share: float) -> None:
        with pytest.raises(ValueError, match="can't be split"):
            split(images, share, seed=0)
