"""The area-weighted error, alone and with its gradient."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.case import Candidate, Case, rows
from bench.micro.measure import CLOCK, Measure
from bench.micro.reconstruction_cases import loss_cases, trained_loss_cases
from bench.micro.timing import Mode


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize(("case", "candidate", "mode"), rows([*loss_cases(), *trained_loss_cases()]))
def test_reconstruction(case: Case[Any, Any], candidate: Candidate, mode: Mode, micro: Measure) -> None:
    """One row."""
    micro(case, candidate, mode)
