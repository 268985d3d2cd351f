"""The test bed's questions through lmms-eval: right where ``bench.accuracy`` is, question by question."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.lmms.conftest import Runs

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-eval")

import ocvtp
from bench.accuracy import testset
from bench.accuracy.answers import correct
from bench.accuracy.loading import ASSETS, MODEL, load_model, load_pruners
from bench.accuracy.selectors import Selector, in_consumed, ours, ours_consumed, ours_name, rivals
from bench.accuracy.standing import BOTH, MODES, PLAIN, Mode, Standing
from bench.testbed.packing import normalise
from ocvtp.methods import random_tokens
from tests.harness.lmms.rows import PICTURES, QUESTIONS, TESTBED, examples

KEEP, TOKENS = 28, 256
SHIPPED = {"testbed-pruner": ours, "testbed-pruner-consumed": ours_consumed}
RULES = {
    "farthest_point": in_consumed("farthest point"),
    "greedy_dpp": in_consumed("greedy DPP"),
    "attention": "attention top-k",
    "grid": "uniform grid",
}
#: Pictures that those are asked about who are not asked about all, and questions asked one at a time.
FEW, ALONE = 5, 16
LAYER = 2  # of testbed-pruner, and of rivals that compare features early


class Bench:
    """``bench.accuracy`` on the same questions.

    Attributes:
        model: of the test bed, unpruned.
        test: its questions.
    """

    def __init__(self) -> None:
        self.model, processor = load_model(MODEL, torch.device("cpu"))
        pruners = load_pruners({name: ASSETS / name for name in SHIPPED}, torch.device("cpu"))
        words = processor.tokenizer.get_vocab()
        self.test = testset.build(self.model, words, "test", PICTURES, QUESTIONS, [LAYER])
        everybody = {one.name: one for one in rivals(LAYER)}
        self._selectors = {name: everybody[called] for name, called in RULES.items()}
        published = {"testbed-pruner": ours_name(0), "testbed-pruner-consumed": in_consumed("ours")}
        for name, called in published.items():
            made = SHIPPED[name]({name: pruners[name]})
            self._selectors[name] = next(one for one in made if one.name == called)
        self._selectors["random"] = Selector("random", _one_draw)

    @functools.cache  # noqa: B019 (one bench for all tests)
    def right(self, name: str | None, mode: Mode = PLAIN) -> np.ndarray:
        """``[Q]`` bool: answered right with :data:`KEEP` tokens, or with all of them."""
        if name is None:
            return correct(self.model, self.test)
        kept = self._selectors[name].choose(self.test, KEEP, 0)
        return correct(self.model, self.test, *Standing(self.model, self.test, kept).seen(mode))


def _one_draw(test: testset.TestSet, keep: int, seed: int) -> torch.Tensor:
    """The product draws once for all pictures, so that no answer depends on the batch it was in."""
    return random_tokens(test.tokens[:1], keep, seed=seed).indices.expand(len(test), -1)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def arguments(name: str | None, mode: Mode | None = PLAIN) -> str:
    """``--model_args``; ``mode=None``: what happens to the others is left to the defaults."""
    if name is None:
        return f"pretrained={MODEL},pruner=none"
    pruner = ASSETS / name if name in SHIPPED else name
    said = f"pretrained={MODEL},pruner={pruner},keep={KEEP}"
    if mode is None:
        return said
    options = asdict(MODES[mode])
    return f"{said},merge={options['merge']},weigh={options['weigh']}"


def check(found: Any, want: np.ndarray, kept: int) -> None:
    """Right answers question by question, and kept tokens wherever they are told."""
    samples = found.samples(TESTBED)
    right = np.array([bool(sample["exact_match"]) for sample in samples])
    np.testing.assert_array_equal(right, want)
    assert found.found["results"][TESTBED]["exact_match,none"] == pytest.approx(want.mean())
    for counts in found.counts(TESTBED):
        assert (counts["images"], counts["output_tokens"]) == (1, 1)
        assert (counts["vision_tokens"], counts["kept_vision_tokens"]) == (TOKENS, kept)
    measured = found.record["measured"]
    assert measured["requests"] == measured["images"] == len(want)
    assert measured["vision_tokens_per_image"] == TOKENS
    assert measured["kept_vision_tokens_per_image"] == kept
    assert found.found["throughput"]["avg_kept_vision_tokens_per_image"] == kept


def everybody() -> list[Any]:
    """Who is asked about how many pictures; ``-m thorough``: the others about all as well."""
    few = [None, "attention", "grid", "random", "greedy_dpp", "testbed-pruner-consumed"]
    every = ["testbed-pruner", "farthest_point"]
    return [
        *(pytest.param(name, FEW, id=f"{name}, {FEW} pictures") for name in few),
        *(pytest.param(name, PICTURES, id=f"{name}, {PICTURES} pictures") for name in every),
        *(
            pytest.param(name, PICTURES, id=f"{name}, {PICTURES} pictures", marks=pytest.mark.thorough)
            for name in few
        ),
    ]


@pytest.mark.parametrize(("name", "pictures"), everybody())
def test_right_where_the_benchmark_is_right(run: Runs, bench: Bench, name: str | None, pictures: int) -> None:
    count = pictures * QUESTIONS
    want = bench.right(name)[:count]
    assert len(want) == count
    check(run(arguments(name), [TESTBED], 8, limit=count), want, TOKENS if name is None else KEEP)


@pytest.mark.parametrize("name", ["greedy_dpp", "testbed-pruner"])
def test_merged_and_weighed_as_by_default(run: Runs, bench: Bench, name: str) -> None:
    found = run(arguments(name, None), [TESTBED], 8, limit=FEW * QUESTIONS)
    check(found, bench.right(name, BOTH)[: FEW * QUESTIONS], KEEP)
    settings = found.record["settings"]
    assert (settings["merge"], settings["weigh"]) == ("projected", True)


@pytest.mark.parametrize(("name", "mode"), [(None, PLAIN), ("testbed-pruner", PLAIN), ("greedy_dpp", BOTH)])
def test_one_at_a_time(run: Runs, bench: Bench, name: str | None, mode: Mode) -> None:
    """The first of the questions, since it takes longer."""
    found = run(arguments(name, mode), [TESTBED], 1, limit=ALONE)
    check(found, bench.right(name, mode)[:ALONE], TOKENS if name is None else KEEP)


def test_as_many_as_each_picture_needs(run: Runs, bench: Bench) -> None:
    """Kept tokens, picture by picture and on average, are those that ``select`` chooses."""
    how = {"keep": "auto", "max_error": 0.6, "budgets": [14, 28, 56, 112]}
    pruner = load_pruners({"": ASSETS / "testbed-pruner"}, torch.device("cpu"))[""]
    with ocvtp.pruned(bench.model, pruner, **how):
        pixels = normalise([one.pixels for one in examples()[:FEW]], 128)
        budgets = ocvtp.vlm.select(bench.model, pixels).count.tolist()
    assert len(set(budgets)) > 1  # pictures that need the same would prove nothing
    said = json.dumps(how["budgets"], separators=(",", ":"))
    options = f"keep=auto,max_error={how['max_error']},budgets={said}"
    base = f"pretrained={MODEL},pruner={ASSETS / 'testbed-pruner'}"
    found = run(f"{base},{options}", [TESTBED], 8, limit=FEW * QUESTIONS)
    kept = [counts["kept_vision_tokens"] for counts in found.counts(TESTBED)]
    assert kept == [budget for budget in budgets for _ in range(QUESTIONS)]
    assert found.record["measured"]["kept_vision_tokens_per_image"] == pytest.approx(np.mean(budgets))
