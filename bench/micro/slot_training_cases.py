"""Slot Attention forward and backward, as in a training step: shapes, inputs, float64 oracle, candidates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from bench.micro.case import Candidate, Case, Function, Gate, bench_device, compiled, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.gates import GateError, Outputs, require_error, worst_error
from bench.micro.slot_inputs import Widths, random_features, random_weights
from ocvtp_kernels.slot_attention import SlotAttentionWeights, slot_attention

#: Ours may err this much, relative to the float64 oracle: twice what the reference errs, plus a few roundings
#: of float32.
SLACK, ROUNDING = 2.0, 2.0**-20
#: The reference itself may err this much: it catches a wrong function, not rounding.
_LOOSE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
_ITERATIONS = 3
_OFFICIAL = Widths()

Forward = Callable[
    [torch.Tensor, torch.Tensor, SlotAttentionWeights], tuple[torch.Tensor, torch.Tensor]
]  # of features, initial slots and weights


class StepInputs(NamedTuple):
    """Features ``[B, N, C]``, initial slots ``[1, K, D]``, weights, and the loss's gradient ``[B, K, D]``."""

    features: torch.Tensor
    slots: torch.Tensor
    weights: SlotAttentionWeights
    grad: torch.Tensor


class StepExpected(NamedTuple):
    """The oracle's slots and gradient, and how much the reference errs in either."""

    results: Outputs
    reference_errors: tuple[float, ...]


@dataclass(frozen=True)
class StepCase(Case[StepInputs, StepExpected]):
    """Truncated backpropagation to initial slots and weights, under autocast to ``dtype``."""

    slots: int
    tokens: int
    widths: Widths = _OFFICIAL

    op = "slot_attention forward and backward"
    family = "slot-training"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        c, h, d, m = self.widths
        return {"B": self.batch, "N": self.tokens, "K": self.slots, "C": c, "H": h, "D": d, "M": m}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _CANDIDATES

    def work(self, candidate: str) -> Work:
        """Every product once: of the last iteration forward and backward, of those before forward."""
        c, h, d, m = self.widths
        encoder = 3 * (c * h + h * d + 2 * d * d)  # the norm before it wants a gradient, too
        attention = (2 * _ITERATIONS + 4) * self.slots * d
        slots = (_ITERATIONS + 2) * (7 * d * d + 2 * d * m)
        flops = 2 * self.batch * (self.tokens * (encoder + attention) + self.slots * slots)
        rows = 4 * self.batch * self.tokens * c
        parameters = 4 * self._parameters
        return Work(
            read=rows + parameters,
            written=parameters + 4 * self.batch * self.slots * (d + self.tokens),
            flops=flops,
            arithmetic="fp32" if self.dtype == torch.float32 else "16-bit",
        )

    @cached_property
    def _parameters(self) -> int:
        return sum(tensor.numel() for tensor in random_weights(self.widths))

    def draw(self, seed: int, device: torch.device) -> StepInputs:
        """Features as an encoder's, a random checkpoint, any gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        features = random_features(self.batch, self.tokens, self.widths.features, torch.float32, generator)
        sizes = (1, self.slots, self.widths.slots), (self.batch, self.slots, self.widths.slots)
        initial, grad = (torch.randn(size, generator=generator, device=device) for size in sizes)
        weights = SlotAttentionWeights(*(t.to(device, copy=True) for t in random_weights(self.widths)))
        return StepInputs(features, initial, weights, grad)

    def results(self, forward: Forward, inputs: StepInputs, *, autocast: bool = True) -> Outputs:
        """Slots, and the gradient of initial slots and all weights in one row."""
        dtype = self.dtype if autocast else torch.float32
        device = inputs.features.device.type
        under = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (inputs.slots, *inputs.weights)]
            with under:
                slots, _ = forward(inputs.features, leaves[0], SlotAttentionWeights(*leaves[1:]))
            grads = torch.autograd.grad(slots, leaves, inputs.grad.to(slots.dtype))
        return slots.detach(), torch.cat([grad.flatten() for grad in grads])[None]

    def expect(self, inputs: StepInputs) -> StepExpected:
        """Of the reference in float64, and in the precision that is timed."""
        features, slots, weights, grad = inputs
        double = SlotAttentionWeights(*(t.double() for t in weights))
        exact = StepInputs(features.double(), slots.double(), double, grad.double())
        want = self.results(_forward("torch"), exact, autocast=False)
        same = self.results(_forward("torch"), inputs)
        return StepExpected(want, tuple(map(_error, same, want)))

    def check(self, candidate: str, got: Outputs, expected: StepExpected) -> Gate:
        """Relative error of the worst image's slots and of the gradient."""
        found: dict[str, object] = {}
        for name, ours, want, reference in zip(
            ("error", "gradient_error"), got, expected.results, expected.reference_errors, strict=True
        ):
            if ours.dtype != torch.float32:
                raise GateError(f"{candidate}: {name} of {ours.dtype}")
            require_error(
                "reference", reference, _LOOSE[self.dtype]
            )  # what defines ours' bound is right itself
            bound = SLACK * reference + ROUNDING
            error = _error(ours, want)
            require_error(f"{candidate}: {name}", error, bound)
            found |= {name: error, name.replace("error", "bound"): bound}
        return found


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return worst_error(got.flatten(1), want.flatten(1))


def _forward(backend: str) -> Forward:
    def forward(
        features: torch.Tensor, slots: torch.Tensor, weights: SlotAttentionWeights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return slot_attention(features, slots, weights, num_iters=_ITERATIONS, backend=backend)

    return forward


def _plain(backend: str) -> Callable[[StepCase], Function]:
    return lambda case: lambda inputs: case.results(_forward(backend), inputs)


def _compiled(backend: str) -> Callable[[StepCase], Function]:
    def make(case: StepCase) -> Function:
        made = compiled(_forward(backend))
        return lambda inputs: case.results(made, inputs)  # type: ignore[arg-type]

    return make


_CANDIDATES = (
    Candidate("ours", _plain("triton"), modes=("eager",), why_not=where_kernels_run),
    Candidate("reference", _plain("torch"), modes=("eager",)),
    Candidate("compiled", _compiled("torch"), modes=("eager",), compiled=True),
)


def step_cases() -> list[StepCase]:
    """Training's two sizes."""
    if bench_device().type != "cuda":
        return [StepCase("llava-64", 1, torch.float32, 64, 144)]
    return [
        StepCase(name, 12, dtype, slots, tokens)
        for name, slots, tokens in (("llava-64", 64, 576), ("next-640", 640, 2880))
        for dtype in (torch.bfloat16, torch.float32)
    ]
