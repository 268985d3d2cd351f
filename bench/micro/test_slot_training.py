"""Slot Attention forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.case import Candidate, Case, rows
from bench.micro.measure import CLOCK, Measure
from bench.micro.slot_training_cases import step_cases
from bench.micro.timing import Mode


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize(("case", "candidate", "mode"), rows(step_cases()))
def test_slot_training(case: Case[Any, Any], candidate: Candidate, mode: Mode, micro: Measure) -> None:
    """One row."""
    micro(case, candidate, mode)
