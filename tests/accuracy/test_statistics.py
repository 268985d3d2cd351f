"""Intervals by resampling pictures, and correlations, against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from bench.accuracy.statistics import estimate, rank_correlation, within


def test_a_mean_lies_in_its_interval_of_the_right_width() -> None:
    """Independent answers: half the interval is 1.96 standard errors."""
    rng = np.random.default_rng(0)
    values = rng.random(4000) < 0.7
    found = estimate(values, np.arange(4000))
    assert found.mean == pytest.approx(values.mean())
    assert found.low < found.mean < found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.sqrt(0.7 * 0.3 / 4000), rel=0.08)


def test_questions_of_one_picture_are_no_independent_evidence() -> None:
    """All eight questions of a picture right or wrong together: as wide as an eighth of the questions."""
    rng = np.random.default_rng(0)
    pictures = rng.random(500) < 0.7
    together = estimate(pictures.repeat(8), np.arange(500).repeat(8))
    alone = estimate(pictures, np.arange(500))
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        chance = rng.beta(4, 2, 120)  # pictures differ
        values = rng.random((120, 5)) < chance[:, None]
        found = estimate(values.ravel(), np.arange(120).repeat(5), seed=trial)
        covered += found.low <= 4 / 6 <= found.high
    assert 88 <= covered <= 100


def test_nothing_asked() -> None:
    assert np.isnan(estimate(np.zeros(0), np.zeros(0, int))).all()


def test_rank_correlation() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, x**3) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # by hand, with a tie: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rank_correlation(np.array([1.0, 2.0, 2.0, 4.0]), x) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_differences_between_pictures_do_not_count_within_them() -> None:
    """Every picture's accuracy rises with the measure, though harder pictures have more of it."""
    measure = np.array([[1.0, 11.0, 21.0], [2.0, 12.0, 22.0], [3.0, 13.0, 23.0]])
    accuracy = np.array([[0.7, 0.4, 0.1], [0.8, 0.5, 0.2], [0.9, 0.6, 0.3]])
    assert within(measure, accuracy) == pytest.approx(1)
    assert np.corrcoef(measure.ravel(), accuracy.ravel())[0, 1] < 0
