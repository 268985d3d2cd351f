"""Does a lower coverage error mean a higher accuracy?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.accuracy.measure import BUDGETS, Row
from bench.accuracy.statistics import rank_correlation, within

#: What a selection is worth by itself; a larger value is better.
MEASURES = {"coverage_read": -1, "coverage_consumed": -1, "shown": 1}


@dataclass(frozen=True)
class Relation:
    """How a measure goes with accuracy, over the selectors of one budget.

    Attributes:
        percent: the budget.
        measure: of :data:`MEASURES`.
        between: rank correlation over selectors of the means over pictures.
        within: correlation over selectors on the same picture, all pictures together.
        selectors: how many.
    """

    percent: int
    measure: str
    between: float
    within: float
    selectors: int


def relations(rows: Sequence[Row]) -> list[Relation]:
    """Of the rows of one split; signs are such that 1 means "better measure, better answers"."""
    found = []
    for percent in BUDGETS:
        some = [row for row in rows if row.percent == percent]
        accuracy = np.array([row.accuracy.mean for row in some])
        by_picture = np.stack([row.by_picture["accuracy"] for row in some])
        asked = ~np.isnan(by_picture[0])
        for measure, sign in MEASURES.items():
            values = sign * np.array([getattr(row, measure) for row in some], dtype=float)
            each = sign * np.stack([row.by_picture[measure] for row in some])
            found.append(
                Relation(
                    percent,
                    measure,
                    rank_correlation(values, accuracy),
                    within(each[:, asked], by_picture[:, asked]),
                    len(some),
                )
            )
    return found
