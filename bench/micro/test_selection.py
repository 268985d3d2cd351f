"""Selection with rows, and the gather alone, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.case import Candidate, Case, rows
from bench.micro.measure import CLOCK, Measure
from bench.micro.selection_cases import gather_cases, scatter_cases, select_cases
from bench.micro.timing import Mode


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize(
    ("case", "candidate", "mode"), rows([*select_cases(), *gather_cases(), *scatter_cases()])
)
def test_selection(case: Case[Any, Any], candidate: Candidate, mode: Mode, micro: Measure) -> None:
    """One row."""
    micro(case, candidate, mode)
