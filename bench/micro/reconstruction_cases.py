"""The area-weighted error, alone and with its gradient: shapes, inputs, float64 oracle, gates, candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.micro.case import Candidate, Case, Function, Gate, bench_device, compiled, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.gates import GateError, Outputs, require_error, worst_error
from ocvtp_kernels.reconstruction import EmptySlots, area_weighted_mse

_WIDTH = 1024
_MAP = 4  # bytes: softmax leaves float32, under autocast too
#: Ours may err this much, relative to the float64 oracle: twice what the reference errs, plus the rounding of
#: a float32 loss.
SLACK, ROUNDING = 2.0, 2.0**-22
#: The others' bounds catch a wrong function, not rounding. Gradients are rounded to the inputs' dtype.
_LOOSE = {"reference": 1e-5, "compiled": 1e-4, "official": 1e-4, "compiled official": 1e-4}
_ROUNDED = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}

Loss = Callable[["LossInputs"], torch.Tensor]


class LossInputs(NamedTuple):
    """``[B, N, C]`` twice, the first of which may want a gradient, and ``[B, K, N]``."""

    reconstruction: torch.Tensor
    features: torch.Tensor
    attention: torch.Tensor


class LossExpected(NamedTuple):
    """The oracle's results and how much the reference errs in each, by the treatment of empty slots."""

    results: Outputs
    reference_errors: tuple[float, ...]


@dataclass(frozen=True)
class LossCase(Case[LossInputs, dict[EmptySlots, LossExpected]]):
    """Forward: losses ``[B]``, as scores of a selection."""

    slots: int
    tokens: int
    width: int = _WIDTH

    op = "area_weighted_mse"
    family = "reconstruction"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "N": self.tokens, "C": self.width, "K": self.slots}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _CANDIDATES

    def work(self, candidate: str) -> Work:
        """Both inputs once; the map twice, since no token's weight is known before all are counted."""
        return Work(read=2 * self._rows() + 2 * self._map(), written=self.batch * 4)

    def _rows(self) -> int:
        return self.batch * self.tokens * self.width * torch.empty((), dtype=self.dtype).element_size()

    def _map(self) -> int:
        return self.batch * self.slots * self.tokens * _MAP

    def draw(self, seed: int, device: torch.device) -> LossInputs:
        """Features and what is near them; a peaked map, every fourth slot of which owns no token."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = self.batch, self.tokens, self.width
        x, noise = (torch.randn(sizes, generator=generator, device=device) for _ in range(2))
        logits = 3 * torch.randn(self.batch, self.slots, self.tokens, generator=generator, device=device)
        logits[:, 3::4] -= 9.0
        return LossInputs((x + 0.5 * noise).to(self.dtype), x.to(self.dtype), logits.softmax(dim=1))

    def results(self, loss: Loss, inputs: LossInputs) -> Outputs:
        """What one call returns."""
        return (loss(inputs),)

    def expect(self, inputs: LossInputs) -> dict[EmptySlots, LossExpected]:
        """Of both treatments: the published code knows one, ours defaults to the other."""
        exact = LossInputs(*(t.double() for t in inputs))
        expected: dict[EmptySlots, LossExpected] = {}
        kinds: tuple[EmptySlots, ...] = ("exclude", "official")
        for empty in kinds:
            want = self.results(_loss("torch", empty), exact)
            reference = self.results(_loss("torch", empty), inputs)
            errors = tuple(map(_error, reference, want))
            expected[empty] = LossExpected(want, errors)
        return expected

    def check(self, candidate: str, got: Outputs, expected: dict[EmptySlots, LossExpected]) -> Gate:
        """Ours: relative error of the worst image against what the reference errs; others: loose bounds."""
        want, allowed = expected["official" if "official" in candidate else "exclude"]
        if got[0].dtype != torch.float32:
            raise GateError(f"{candidate}: losses in {got[0].dtype}")
        found: dict[str, float] = {}
        names = ("error", "gradient_error")[: len(want)]
        for name, ours, theirs, reference in zip(names, got, want, allowed, strict=True):
            rounded = _LOOSE["reference"] if name == "error" else _ROUNDED[self.dtype]
            require_error("reference", reference, rounded)  # what defines ours' bound is right itself
            bound = SLACK * reference + ROUNDING
            if candidate in _LOOSE:
                bound = max(_LOOSE[candidate], rounded)
            error = _error(ours, theirs)
            require_error(f"{candidate}: {name}", error, bound)
            found |= {name: error, name.replace("error", "bound"): bound}
        return found


@dataclass(frozen=True)
class TrainedLossCase(LossCase):
    """Forward and backward: the gradient that training takes, of the mean loss, for the reconstruction."""

    op = "area_weighted_mse forward and backward"

    def work(self, candidate: str) -> Work:
        """Both inputs once more, and a gradient."""
        forward = super().work(candidate)
        return Work(read=forward.read + 2 * self._rows(), written=forward.written + self._rows())

    def results(self, loss: Loss, inputs: LossInputs) -> Outputs:
        """Losses and gradient."""
        with torch.enable_grad():
            leaf = inputs.reconstruction.detach().requires_grad_()
            losses = loss(inputs._replace(reconstruction=leaf))
            (gradient,) = torch.autograd.grad(losses.mean(), leaf)
        return losses.detach(), gradient


def official_loss(
    reconstruction: torch.Tensor, features: torch.Tensor, attention: torch.Tensor
) -> torch.Tensor:
    """The published loss ``[B]`` in float32, a tensor operation for each step of its formula.

    Restated by us. Owned tokens are counted over a one-hot map here; how the published code counts is not
    part of what we know of it.
    """
    attention = attention.detach()
    owned = F.one_hot(attention.argmax(dim=1), attention.shape[1]).float().mean(dim=1)  # [B, K]
    weights = owned.clamp(min=1e-8) ** -0.5
    weights = (weights / weights.mean(dim=1, keepdim=True)).clamp(max=10.0)
    omega = torch.einsum("bkn,bk->bn", attention.to(weights.dtype), weights)
    error = F.mse_loss(reconstruction.float(), features.float(), reduction="none").mean(dim=2)
    return (omega * error).sum(dim=1) / omega.sum(dim=1).clamp(min=1e-8)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return worst_error(got.reshape(len(got), -1), want.reshape(len(want), -1))


def _loss(backend: str, empty: EmptySlots = "exclude") -> Loss:
    return lambda i: area_weighted_mse(*i, empty_slots=empty, reduction="none", backend=backend)


def _official(inputs: LossInputs) -> torch.Tensor:
    return official_loss(*inputs)


def _plain(loss: Loss) -> Callable[[LossCase], Function]:
    return lambda case: lambda inputs: case.results(loss, inputs)


def _compiled(loss: Loss) -> Callable[[LossCase], Function]:
    """The loss alone, with the backward pass that PyTorch's compiler makes of it."""

    def make(case: LossCase) -> Function:
        made = compiled(lambda inputs: (loss(inputs),))
        return lambda inputs: case.results(lambda i: made(i)[0], inputs)

    return make


_AS_PUBLISHED = "empty slots get the largest weight, as published"
_CANDIDATES = (
    Candidate("ours", _plain(_loss("triton")), why_not=where_kernels_run),
    Candidate(
        "ours official", _plain(_loss("triton", "official")), why_not=where_kernels_run, note=_AS_PUBLISHED
    ),
    Candidate("reference", _plain(_loss("torch"))),
    Candidate("official", _plain(_official), note=_AS_PUBLISHED),
    Candidate("compiled", _compiled(_loss("torch")), compiled=True),
    Candidate("compiled official", _compiled(_official), compiled=True, note=_AS_PUBLISHED),
)


def loss_cases() -> list[LossCase]:
    """Training's two sizes and one image of the smaller."""
    return [LossCase(*size) for size in _sizes()]


def trained_loss_cases() -> list[TrainedLossCase]:
    """The same, with the gradient."""
    return [TrainedLossCase(*size) for size in _sizes()]


def _sizes() -> list[tuple[str, int, torch.dtype, int, int]]:
    if bench_device().type != "cuda":
        return [("llava-64", 1, torch.float32, 64, 576), ("next-160", 1, torch.float32, 160, 720)]
    return [
        (name, batch, dtype, slots, tokens)
        for name, batch, slots, tokens in (
            ("llava-64", 1, 64, 576),
            ("llava-64", 12, 64, 576),
            ("next-640", 12, 640, 2880),
        )
        for dtype in (torch.float16, torch.bfloat16)
    ]
