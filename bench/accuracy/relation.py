"""Does a lower coverage error mean a higher accuracy?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.accuracy.measure import BUDGETS, Row
from bench.accuracy.statistics import Estimate, interval, rank_correlation, within

#: What a selection is worth by itself; a larger value is better.
MEASURES = {"coverage_read": -1, "coverage_consumed": -1, "shown": 1}
_OURS = "ours"


@dataclass(frozen=True)
class Relation:
    """How a measure goes with accuracy, over the methods of one budget. 1: better measure, better answers.

    Attributes:
        percent: the budget.
        measure: of :data:`MEASURES`.
        methods: how many; several trainings of one are averaged.
        between: rank correlation over methods of the means over pictures.
        rivals: the same without ours, which share a pruner and differ by rounds that lower the error by
            construction.
        within: correlation over methods on the same picture, all pictures together, with its 95 % interval
            by resampling pictures.
    """

    percent: int
    measure: str
    methods: int
    between: float
    rivals: float
    within: Estimate


def relations(rows: Sequence[Row]) -> list[Relation]:
    """Of the rows of one split."""
    found = []
    for percent in BUDGETS:
        some = [row for row in rows if row.percent == percent]
        names = list(dict.fromkeys(row.method for row in some))
        accuracy = _by_method(some, names, "accuracy")
        for measure, sign in MEASURES.items():
            values = sign * _by_method(some, names, measure)
            known = ~(np.isnan(accuracy).any(0) | np.isnan(values).any(0))
            x, y = values[:, known], accuracy[:, known]
            means = x.mean(1), y.mean(1)
            rivals = np.array([not name.startswith(_OURS) for name in names])
            found.append(
                Relation(
                    percent,
                    measure,
                    len(names),
                    rank_correlation(*means),
                    rank_correlation(means[0][rivals], means[1][rivals]),
                    interval(functools.partial(_within, x, y), x.shape[1]),
                )
            )
    return found


def _within(x: np.ndarray, y: np.ndarray, pictures: np.ndarray) -> float:
    return within(x[:, pictures], y[:, pictures])


def _by_method(rows: Sequence[Row], names: Sequence[str], what: str) -> np.ndarray:
    """``[methods, pictures]``."""
    return np.stack(
        [np.mean([r.by_picture[what] for r in rows if r.method == name], axis=0) for name in names]
    )
