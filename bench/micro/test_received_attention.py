"""Received attention, dense and packed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.case import Candidate, Case, rows
from bench.micro.measure import CLOCK, Measure
from bench.micro.received_cases import received_cases
from bench.micro.timing import Mode


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize(("case", "candidate", "mode"), rows(received_cases()))
def test_received_attention(case: Case[Any, Any], candidate: Candidate, mode: Mode, micro: Measure) -> None:
    """One row."""
    micro(case, candidate, mode)
