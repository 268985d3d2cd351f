"""Merging tokens into kept ones, and its gradient."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.case import Candidate, Case, rows
from bench.micro.measure import CLOCK, Measure
from bench.micro.merge_cases import merge_cases, spread_cases
from bench.micro.timing import Mode


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize(("case", "candidate", "mode"), rows([*merge_cases(), *spread_cases()]))
def test_merge(case: Case[Any, Any], candidate: Candidate, mode: Mode, micro: Measure) -> None:
    """One row."""
    micro(case, candidate, mode)
