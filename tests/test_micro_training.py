"""The microbenchmark of a training step: its gate, and what it counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.micro.gates import GateError, poisoned_memory
from bench.micro.slot_inputs import Widths
from bench.micro.slot_training_cases import StepCase, _forward, step_cases
from ocvtp_kernels._arch import interpreting

CPU = torch.device("cpu")
TINY = StepCase("tiny", 2, torch.float32, 4, 24, Widths(24, 40, 16, 32))


pytestmark = pytest.mark.usefixtures("fresh_inputs")


@pytest.mark.skipif(not interpreting(), reason="Triton doesn't interpret here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_kernels_pass_the_gate_that_a_gpu_has_to(dtype: torch.dtype) -> None:
    case = StepCase("tiny", 2, dtype, 4, 24, Widths(24, 40, 16, 32))
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    for which in case.candidates():
        if not which.compiled:
            with poisoned_memory(), torch.no_grad():
                gate = case.check(which.name, which.make(case)(inputs), expected)
            assert set(gate) == {"error", "bound", "gradient_error", "gradient_bound"}


def test_a_gradient_that_is_wrong_passes_no_gate() -> None:
    inputs = TINY.draw(0, CPU)
    expected = TINY.expect(inputs)
    slots, gradient = TINY.results(_forward("torch"), inputs)
    TINY.check("ours", (slots, gradient), expected)
    wrong = gradient.clone()
    wrong[:, :64] = 0.0  # of the initial slots
    for got in ((slots, wrong), (slots * 1.001, gradient), (slots, gradient * torch.nan)):
        with pytest.raises(GateError):
            TINY.check("ours", got, expected)


@pytest.mark.parametrize("case", [TINY, *step_cases()], ids=lambda case: case.label)
def test_the_floor_counts_what_pytorch_multiplies(case: StepCase) -> None:
    """In the reference, with features that want no gradient."""
    inputs = case.draw(0, CPU)
    with FlopCounterMode(display=False) as counter:
        case.results(_forward("torch"), inputs)
    assert case.work("ours").flops == counter.get_total_flops()
