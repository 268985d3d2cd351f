"""Confidence intervals by resampling pictures: questions about one picture stand and fall together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000
_FEW_RESAMPLES = 500
_TAILS = (2.5, 97.5)


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray, picture: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of ``values`` ``[Q]`` over questions, of pictures ``picture`` ``[Q]``; NaN without questions."""
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    _, number = np.unique(picture, return_inverse=True)
    sums = np.bincount(number, weights=values.astype(float))
    counts = np.bincount(number).astype(float)
    times = _drawn(len(sums), seed)
    means = (times @ sums) / (times @ counts)
    low, high = np.percentile(means, _TAILS)
    return Estimate(float(values.mean()), float(low), float(high))


@functools.lru_cache(maxsize=32)
def _drawn(pictures: int, seed: int) -> np.ndarray:
    """``[resamples, pictures]``: how often each resample has each picture."""
    drawn = np.random.default_rng(seed).integers(pictures, size=(_RESAMPLES, pictures))
    return np.stack([np.bincount(row, minlength=pictures) for row in drawn]).astype(np.float32)


def interval(value: Callable[[np.ndarray], float], pictures: int, seed: int = 0) -> Estimate:
    """A figure of all pictures, and its 95 % interval; ``value`` takes the numbers of the pictures drawn."""
    rng = np.random.default_rng(seed)
    drawn = [value(rng.integers(pictures, size=pictures)) for _ in range(_FEW_RESAMPLES)]
    low, high = np.percentile(drawn, _TAILS)
    return Estimate(value(np.arange(pictures)), float(low), float(high))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; equal values share a rank. NaN where all are equal."""
    return within(_ranks(x)[:, None], _ranks(y)[:, None])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[number]


def within(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ``[M, P]`` over M within each of P, the differences between the P taken off.

    NaN where nothing varies.
    """
    x = x - x.mean(0)
    y = y - y.mean(0)
    spread = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread else np.nan
