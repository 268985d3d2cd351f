"""Every selector at every budget: accuracy by kind and size, and what kept tokens are worth themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bench.accuracy.answers import correct
from bench.accuracy.selectors import Selector, ours_name
from bench.accuracy.standing import BEFORE, BOTH, PLAIN, Mode, Standing
from bench.accuracy.statistics import Estimate, estimate
from bench.accuracy.testset import TestSet
from bench.evidence.rows import BUDGETS, keep_of
from bench.testbed.questions import KINDS
from bench.testbed.scenes import SIZES
from ocvtp import metrics

#: Lines that are no selector's.
UNPRUNED, GUESSED, OTHER = "all tokens", "words alone: the commonest answer", "another picture's tokens"
BLIND = "words alone: a model trained so"
_ANY_SIZE = ("color", "shape", "position")
#: Budgets at which it matters where the mean is taken.
_BEFORE_AT = (5, 11)


@dataclass
class Row:
    """A selector at a budget on a split, in one mode.

    Attributes:
        split: of the questions.
        method: its name.
        group: which of several trainings, or "".
        percent: of the tokens, kept.
        keep: tokens kept.
        seeds: draws averaged over.
        accuracy: of all questions, with its 95 % interval over pictures.
        seed_spread: standard deviation of the accuracy over seeds.
        kinds: accuracy by kind of question.
        sizes: accuracy by size of the thing asked about, of the kinds that ask about one thing of any size
            (color, shape, position).
        mode: what its tokens stand for (:mod:`bench.accuracy.standing`).
        over_everything: accuracy beyond that of all tokens, on the same questions.
        over_plain: beyond the same selector's in mode "plain".
        over_random: beyond that of random tokens, in the same mode.
        over_published: beyond that of ours as published, the mean of its trainings, in the same mode.
        coverage_read: coverage error of the features that the pruner reads, mean over pictures.
        coverage_consumed: of the features that the language model reads.
        shown: of the questions about things, the share whose things have a kept token on them.
        if_shown: accuracy on those.
        if_not: accuracy on the others that are about things.
    """

    split: str
    method: str
    group: str
    percent: int
    keep: int
    seeds: int
    accuracy: Estimate
    seed_spread: float
    kinds: dict[str, Estimate]
    sizes: dict[str, Estimate]
    mode: Mode = PLAIN
    over_everything: Estimate | None = None
    over_plain: Estimate | None = None
    over_random: Estimate | None = None
    over_published: Estimate | None = None
    coverage_read: float | None = None
    coverage_consumed: float | None = None
    shown: float | None = None
    if_shown: float | None = None
    if_not: float | None = None
    by_picture: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Accuracy and coverage errors of every picture; not recorded."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an interval is a list of mean, low and high, or nothing where there was no question."""
        return {name: without_nan(value) for name, value in vars(self).items() if name != "by_picture"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """A row of a record."""
        return cls(**{name: _estimates(value) for name, value in values.items()})


def _estimates(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _estimates(each) for name, each in value.items()}
    return Estimate(*value) if isinstance(value, list) else value


def without_nan(value: Any) -> Any:
    """The same with ``None`` for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def plain_row(test: TestSet, method: str, right: np.ndarray) -> Row:
    """A line without a selector."""
    return _row(test, method, "", PLAIN, 100, test.tokens.shape[1], right[None])


def rows(
    model: Any,
    test: TestSet,
    selectors: Sequence[Selector],
    layer: int,
    everything: np.ndarray,
    say: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """One row for every selector, budget and mode; the selector called "random" must come first.

    Args:
        model: of the test bed.
        test: pictures and questions.
        selectors: to measure.
        layer: "features read" of every row alike.
        everything: ``[Q]`` bool, right answers with all tokens.
        say: told what is being measured.
    """
    for percent in BUDGETS:
        keep = keep_of(percent, test.tokens.shape[1])
        found: list[tuple[Row, np.ndarray]] = []
        for selector in selectors:
            if say is not None:
                say(f"{test.split}, {percent} %: {selector.name} {selector.group}")
            kept = [selector.choose(test, keep, seed) for seed in range(selector.seeds)]
            found += _in_all_modes(model, test, selector, percent, layer, kept)
        _compare(found, everything, test.picture_of)
        yield from (row for row, _ in found)


def _in_all_modes(
    model: Any, test: TestSet, selector: Selector, percent: int, layer: int, kept: Sequence[torch.Tensor]
) -> Iterator[tuple[Row, np.ndarray]]:
    """Rows of a selector, and ``[Q]`` of each: how often a question was answered right."""
    standing = [Standing(model, test, indices) for indices in kept]
    worth = _Worth(test, layer, kept)
    for mode in selector.modes:
        if mode == BEFORE and percent not in _BEFORE_AT:
            continue
        # One draw tells what the modes between the two ends are worth.
        drawn = standing if mode in (PLAIN, BOTH) else standing[:1]
        right = np.stack([correct(model, test, *one.seen(mode)) for one in drawn])
        row = _row(test, selector.name, selector.group, mode, percent, kept[0].shape[1], right)
        worth.add_to(row, right)
        yield row, right.mean(0)


def _compare(found: Sequence[tuple[Row, np.ndarray]], everything: np.ndarray, picture: np.ndarray) -> None:
    """Fill in differences between rows of one budget, question by question."""
    answered = {(row.method, row.group, row.mode): mean for row, mean in found}
    for row, mean in found:
        row.over_everything = estimate(mean - everything, picture)
        plain = answered.get((row.method, row.group, PLAIN))
        if plain is not None and row.mode != PLAIN:
            row.over_plain = estimate(mean - plain, picture)
        chance = answered.get(("random", "", row.mode))
        if chance is not None and row.method != "random":
            row.over_random = estimate(mean - chance, picture)
        published = [
            each for (method, _, mode), each in answered.items() if (method, mode) == (ours_name(0), row.mode)
        ]
        if published and row.method != ours_name(0):
            row.over_published = estimate(mean - np.mean(published, axis=0), picture)


def _row(
    test: TestSet, method: str, group: str, mode: Mode, percent: int, keep: int, right: np.ndarray
) -> Row:
    """Of ``right`` ``[seeds, Q]``."""
    mean, picture = right.mean(0), test.picture_of
    return Row(
        split=test.split,
        method=method,
        group=group,
        percent=percent,
        keep=keep,
        seeds=len(right),
        accuracy=estimate(mean, picture),
        seed_spread=float(right.mean(1).std(ddof=1)) if len(right) > 1 else 0.0,
        kinds={kind: _where(mean, picture, test.kinds == kind) for kind in KINDS},
        sizes=_by_size(test, mean),
        mode=mode,
        by_picture={"accuracy": _picture_means(mean, picture, len(test))},
    )


def _where(values: np.ndarray, picture: np.ndarray, which: np.ndarray) -> Estimate:
    return estimate(values[which], picture[which])


def _by_size(test: TestSet, mean: np.ndarray) -> dict[str, Estimate]:
    radii, found = test.radii(), {}
    comparable = np.isin(test.kinds, _ANY_SIZE)
    for name, (least, most) in SIZES.items():
        found[name] = _where(mean, test.picture_of, comparable & (radii >= least) & (radii <= most))
    return found


class _Worth:
    """What kept tokens are worth by themselves, in any mode."""

    def __init__(self, test: TestSet, layer: int, kept: Sequence[torch.Tensor]) -> None:
        self._test = test
        self._about = test.asked_about_things()
        self._coverage = {
            name: torch.stack([metrics.coverage(x, indices) for indices in kept])
            .double()
            .mean(0)
            .cpu()
            .numpy()
            for name, x in (("coverage_read", test.layers[layer]), ("coverage_consumed", test.tokens))
        }
        self._shown = np.stack([test.shown(indices) for indices in kept])[:, self._about]

    def add_to(self, row: Row, right: np.ndarray) -> None:
        """Of ``right`` ``[seeds, Q]``, the answers with the first of the kept tokens."""
        for name, each in self._coverage.items():
            setattr(row, name, float(each.mean()))
            row.by_picture[name] = each
        right, shown = right[:, self._about], self._shown[: len(right)]
        row.by_picture["shown"] = _picture_means(
            self._shown.mean(0), self._test.picture_of[self._about], len(self._test)
        )
        row.shown = float(self._shown.mean())
        row.if_shown = float(right[shown].mean()) if shown.any() else None
        row.if_not = float(right[~shown].mean()) if (~shown).any() else None


def _picture_means(values: np.ndarray, picture: np.ndarray, pictures: int) -> np.ndarray:
    """``[pictures]``; NaN where a picture has no question."""
    counts = np.bincount(picture, minlength=pictures)
    with np.errstate(invalid="ignore"):
        return np.bincount(picture, weights=values.astype(float), minlength=pictures) / counts
