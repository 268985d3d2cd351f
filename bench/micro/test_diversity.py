"""Farthest points and the largest volume."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.case import Candidate, Case, rows
from bench.micro.diversity_cases import diverse_cases
from bench.micro.measure import CLOCK, Measure
from bench.micro.timing import Mode


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize(("case", "candidate", "mode"), rows(diverse_cases()))
def test_diversity(case: Case[Any, Any], candidate: Candidate, mode: Mode, micro: Measure) -> None:
    """One row."""
    micro(case, candidate, mode)
