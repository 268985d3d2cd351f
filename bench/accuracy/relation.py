"""Does a lower coverage error mean a higher accuracy?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.accuracy.measure import BUDGETS, Row
from bench.accuracy.standing import BOTH, PLAIN, Mode
from bench.accuracy.statistics import Estimate, interval, rank_correlation, within

#: What a selection is worth by itself; a larger value is better.
MEASURES = {"coverage_read": -1, "coverage_consumed": -1, "shown": 1}
#: In which accuracy is related to them.
RELATED: tuple[Mode, ...] = (PLAIN, BOTH)
_OURS = "ours"


@dataclass(frozen=True)
class Relation:
    """How a measure goes with accuracy, over the methods of one budget. 1: better measure, better answers.

    Attributes:
        mode: what kept tokens stand for.
        percent: the budget.
        measure: of :data:`MEASURES`.
        methods: how many; several trainings of one are averaged.
        between: rank correlation over methods of the means over pictures.
        rivals: the same without ours, which share a pruner and differ by rounds that lower the error by
            construction.
        within: correlation over methods on the same picture, all pictures together, with its 95 % interval
            by resampling pictures.
    """

    mode: Mode
    percent: int
    measure: str
    methods: int
    between: float
    rivals: float
    within: Estimate


def relations(rows: Sequence[Row]) -> list[Relation]:
    """Of the rows of one split."""
    return [
        _relation([row for row in rows if (row.mode, row.percent) == (mode, percent)], mode, percent, measure)
        for mode in RELATED
        for percent in BUDGETS
        for measure in MEASURES
    ]


def _relation(rows: Sequence[Row], mode: Mode, percent: int, measure: str) -> Relation:
    names = list(dict.fromkeys(row.method for row in rows))
    accuracy = _by_method(rows, names, "accuracy")
    values = MEASURES[measure] * _by_method(rows, names, measure)
    known = ~(np.isnan(accuracy).any(0) | np.isnan(values).any(0))
    x, y = values[:, known], accuracy[:, known]
    means = x.mean(1), y.mean(1)
    rivals = np.array([not name.startswith(_OURS) for name in names])
    return Relation(
        mode,
        percent,
        measure,
        len(names),
        rank_correlation(*means),
        rank_correlation(means[0][rivals], means[1][rivals]),
        interval(functools.partial(_within, x, y), x.shape[1]),
    )


def _within(x: np.ndarray, y: np.ndarray, pictures: np.ndarray) -> float:
    return within(x[:, pictures], y[:, pictures])


def _by_method(rows: Sequence[Row], names: Sequence[str], what: str) -> np.ndarray:
    """``[methods, pictures]``."""
    return np.stack(
        [np.mean([r.by_picture[what] for r in rows if r.method == name], axis=0) for name in names]
    )
