"""Farthest points and the largest volume: shapes, inputs, float64 oracle, gates, candidates.

Both ways in which the kernels can run are timed by themselves, too: whoever decides which images are small
(``ocvtp_kernels.diversity.triton.SMALL``) has to see them side by side. ``torch.compile`` is no candidate: it
would unroll every step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.micro.case import Candidate, Case, Gate, bench_device, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.clusters import clustered
from bench.micro.gates import GateError, Outputs
from ocvtp_kernels import diversity

_INDEX = 8  # bytes
#: By this share of the best, float32 may take one for the other; the kernels' tests have the same.
_MARGIN = 1e-4
#: More numbers than any image has.
_ALL = 2**62


class Drawn(NamedTuple):
    """``[B, N, C]``; as a tuple, like all inputs."""

    x: torch.Tensor


@dataclass(frozen=True)
class DiverseCase(Case[Drawn, torch.Tensor]):
    """One of both, in the order of choice."""

    keep: int
    tokens: int
    width: int = 1024

    family = "diversity"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "N": self.tokens, "C": self.width, "T": self.keep}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _CANDIDATES

    def work(self, candidate: str) -> Work:
        """Features once, and every token against every kept one but the last."""
        size = torch.empty((), dtype=self.dtype).element_size()
        numbers = self.batch * self.tokens * self.width
        kept = self.batch * self.keep * _INDEX
        return Work(numbers * size, kept, flops=2 * numbers * (self.keep - 1), arithmetic="fp32")

    def draw(self, seed: int, device: torch.device) -> Drawn:
        """Tokens around as many centres as are kept."""
        generator = torch.Generator(device).manual_seed(seed)
        x = clustered(generator, self.batch, self.tokens, self.width, self.keep)
        return Drawn(x.to(self.dtype))

    def expect(self, inputs: Drawn) -> torch.Tensor:
        """Only what is compared: the gate follows the choices that were made."""
        return inputs.x.double()

    def check(self, candidate: str, got: Outputs, expected: torch.Tensor) -> Gate:
        """Tokens of the image, each once, and every one the best in float64, given those before it."""
        order = got[0]
        if order.shape != (self.batch, self.keep) or order.dtype != torch.int64:
            raise GateError(f"{candidate}: {order.dtype} {list(order.shape)}")
        if int(order.min()) < 0 or int(order.max()) >= self.tokens:
            raise GateError(f"{candidate}: kept tokens are not of the image")
        if not (order.sort(dim=1).values.diff(dim=1) > 0).all():
            raise GateError(f"{candidate}: a token is kept twice")
        worst = self.worst(expected, order)
        if not worst <= _MARGIN:
            raise GateError(f"{candidate}: a choice falls short of the best by {worst:.2e} of it")
        return {"error": worst, "bound": _MARGIN}

    @abstractmethod
    def worst(self, x: torch.Tensor, order: torch.Tensor) -> float:
        """By how much of the best the worst choice falls short of it."""


class FarthestCase(DiverseCase):
    """Farthest points."""

    op = "farthest_points"

    def worst(self, x: torch.Tensor, order: torch.Tensor) -> float:
        """By squared distances."""
        return _farthest(x, order)


class VolumeCase(DiverseCase):
    """The largest volume."""

    op = "largest_volume"

    def worst(self, x: torch.Tensor, order: torch.Tensor) -> float:
        """By squared volumes."""
        return _volume(x, order)


def _farthest(x: torch.Tensor, order: torch.Tensor) -> float:
    start = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=2)
    chosen = start.gather(1, order[:, :1])[:, 0]
    worst = float((chosen / start.amin(dim=1) - 1.0).max())
    nearest = torch.full_like(start, torch.inf)
    for before, token in zip(order.unbind(1), order[:, 1:].unbind(1), strict=False):
        nearest = torch.minimum(nearest, (x - _row(x, before)).square().sum(dim=2))
        worst = max(worst, _short(nearest, token))
    return worst


def _volume(x: torch.Tensor, order: torch.Tensor) -> float:
    """A token adds what of it is orthogonal to all kept ones."""
    if order[:, 0].any():
        return torch.inf
    rest = torch.nn.functional.normalize(x, dim=2)
    worst = 0.0
    for before, token in zip(order.unbind(1), order[:, 1:].unbind(1), strict=False):
        direction = torch.nn.functional.normalize(_row(rest, before), dim=2)
        rest = rest - (rest @ direction.mT) * direction
        worst = max(worst, _short(rest.square().sum(dim=2), token))
    return worst


def _short(values: torch.Tensor, token: torch.Tensor) -> float:
    return float((1.0 - values.gather(1, token[:, None])[:, 0] / values.amax(dim=1)).max())


def _row(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return x.gather(1, token[:, None, None].expand(-1, 1, x.shape[2]))


def _public(case: DiverseCase, backend: str, inputs: Drawn) -> Outputs:
    return (getattr(diversity, case.op)(inputs.x, case.keep, ascending=False, backend=backend),)


def _kernels(case: DiverseCase, small: int, inputs: Drawn) -> Outputs:
    from ocvtp_kernels.diversity import triton as kernels

    return (getattr(kernels, case.op)(inputs.x, case.keep, small),)


_CANDIDATES = (
    Candidate("ours", lambda case: lambda i: _public(case, "triton", i), why_not=where_kernels_run),
    Candidate(
        "one program an image", lambda case: lambda i: _kernels(case, _ALL, i), why_not=where_kernels_run
    ),
    Candidate("a launch a step", lambda case: lambda i: _kernels(case, 0, i), why_not=where_kernels_run),
    Candidate("reference", lambda case: lambda i: _public(case, "torch", i)),
)


def diverse_cases() -> list[DiverseCase]:
    """LLaVA-1.5's images, one and many, and LLaVA-NeXT's."""
    on_gpu = bench_device().type == "cuda"
    dtype = torch.float16 if on_gpu else torch.float32
    sizes = [("llava-64", 1, 64, 576), ("next-160", 1, 160, 2880 if on_gpu else 720)]
    if on_gpu:
        sizes += [("llava-64", 8, 64, 576), ("llava-64", 64, 64, 576), ("next-160", 8, 160, 2880)]
    return [
        kind(name, batch, dtype, keep, tokens)
        for kind in (FarthestCase, VolumeCase)
        for name, batch, keep, tokens in sizes
    ]
