"""Merging tokens into kept ones, and its gradient: shapes, inputs, float64 oracle, gates, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.micro import kmeans
from bench.micro.case import Candidate, Case, Gate, bench_device, compiled, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.clusters import clustered, some_tokens
from bench.micro.gates import GateError, Outputs, require_equal, require_error, worst_error
from bench.micro.kmeans import LOOSE, PEER
from ocvtp_kernels.merge import merge_tokens, op

_INDEX = 8  # bytes
_MASS = 4
#: Of an image's mean squared norm: an owner may be this much farther than the nearest. Measured on a CPU, a
#: squared distance in float32 errs a fifth of it.
_NEAR = 2.0**-18
#: The same for the peer, whose operands are 16 bit.
_NEAR_IN_HALF = 2.0**-7


class MergeInputs(NamedTuple):
    """``[B, N, C]`` and ``[B, keep]``."""

    x: torch.Tensor
    indices: torch.Tensor


class MergeExpected(NamedTuple):
    """In float64: features ``[B, N, C]``, squared distances to kept tokens ``[B, N, keep]``, an image's mean
    squared norm ``[B]``; and the kept tokens ``[B, keep]``."""

    x: torch.Tensor
    distances: torch.Tensor
    indices: torch.Tensor
    norm: torch.Tensor


class SpreadInputs(NamedTuple):
    """A gradient ``[B, keep, C]``, owners ``[B, N]``, masses ``[B, keep]``."""

    grad: torch.Tensor
    owner: torch.Tensor
    mass: torch.Tensor


@dataclass(frozen=True)
class MergeCase(Case[MergeInputs, MergeExpected]):
    """``merge_tokens``, compared by what is averaged."""

    keep: int
    tokens: int
    width: int = 1024

    op = "merge_tokens"
    family = "merge"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "N": self.tokens, "C": self.width, "keep": self.keep}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _MERGE

    def work(self, candidate: str) -> Work:
        """Features in, rows, masses and owners out; products of all tokens and the kept ones."""
        row = self.width * self.dtype.itemsize
        made = self.batch * (self.keep * (row + _MASS) + self.tokens * _INDEX)
        flops = 2 * self.batch * self.tokens * self.keep * self.width
        read = self.batch * (self.tokens * row + self.keep * _INDEX)
        return Work(read, made, flops=flops, arithmetic="16-bit" if candidate == PEER else "fp32")

    def draw(self, seed: int, device: torch.device) -> MergeInputs:
        """Tokens around as many centres as are kept; the kept ones at random, ascending."""
        generator = torch.Generator(device).manual_seed(seed)
        x = clustered(generator, self.batch, self.tokens, self.width, self.keep)
        kept = some_tokens(generator, self.batch, self.tokens, self.keep)
        return MergeInputs(x.to(self.dtype), kept)

    def expect(self, inputs: MergeInputs) -> MergeExpected:
        """How far everything is."""
        x = inputs.x.double()
        kept = x.gather(1, inputs.indices[:, :, None].expand(-1, -1, self.width))
        norms = x.square().sum(dim=2)
        distances = norms[:, :, None] + kept.square().sum(dim=2)[:, None, :] - 2.0 * x @ kept.mT
        return MergeExpected(x, distances, inputs.indices, norms.mean(dim=1))

    def check(self, candidate: str, got: Outputs, expected: MergeExpected) -> Gate:
        """No kept token is nearer than the owner but by rounding, kept ones own themselves, masses are counts
        of owners, and rows their means."""
        rows, mass, owner = got
        where = self.batch, self.tokens
        if owner.shape != where or int(owner.min()) < 0 or int(owner.max()) >= self.keep:
            raise GateError(f"{candidate}: owners {list(owner.shape)} are not positions among the kept")
        owner = owner.long()
        excess = expected.distances.gather(2, owner[:, :, None])[:, :, 0] - expected.distances.amin(dim=2)
        too_far = float((excess / expected.norm[:, None]).max())
        near = _NEAR_IN_HALF if candidate == PEER else _NEAR
        if not too_far <= near:
            raise GateError(f"{candidate}: a kept token is nearer than the owner by {too_far:.2e}")
        own = torch.arange(self.keep, device=owner.device).expand(self.batch, self.keep)
        require_equal(f"{candidate}: owners of the kept", owner.gather(1, expected.indices), own)
        member = torch.nn.functional.one_hot(owner, self.keep)
        require_equal(f"{candidate}: masses", mass, member.sum(dim=1).float())
        means = member.double().mT @ expected.x / mass.double()[:, :, None]
        error = worst_error(rows.flatten(1), means.flatten(1))
        bound = LOOSE if candidate == PEER else 2 * torch.finfo(self.dtype).eps
        require_error(candidate, error, bound)
        return {"error": error, "bound": bound, "excess_of_distance": too_far}


@dataclass(frozen=True)
class SpreadCase(Case[SpreadInputs, torch.Tensor]):
    """The gradient of ``merge_by``, without autograd's own cost."""

    keep: int
    tokens: int
    width: int = 1024

    op = "merge_by backward"
    family = "merge"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "N": self.tokens, "C": self.width, "keep": self.keep}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _SPREAD

    def work(self, candidate: str) -> Work:
        """Rows, masses and owners in, all tokens out."""
        row = self.width * self.dtype.itemsize
        read = self.batch * (self.keep * (row + _MASS) + self.tokens * _INDEX)
        return Work(read, self.batch * self.tokens * row)

    def draw(self, seed: int, device: torch.device) -> SpreadInputs:
        """Owners of very different size, as an image's are: half of all tokens have the first."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = self.batch, self.tokens
        grad = torch.randn(self.batch, self.keep, self.width, generator=generator, device=device)
        owner = torch.randint(-self.keep, self.keep, sizes, generator=generator, device=device).clamp(min=0)
        mass = torch.nn.functional.one_hot(owner, self.keep).sum(dim=1).float()
        return SpreadInputs(grad.to(self.dtype), owner, mass)

    def expect(self, inputs: SpreadInputs) -> torch.Tensor:
        """In float64."""
        return _spread(inputs._replace(grad=inputs.grad.double(), mass=inputs.mass.double()))[0]

    def check(self, candidate: str, got: Outputs, expected: torch.Tensor) -> Gate:
        """A division and a rounding."""
        error = worst_error(got[0].flatten(1), expected.flatten(1))
        bound = 2 * torch.finfo(self.dtype).eps
        require_error(candidate, error, bound)
        if got[0].dtype != self.dtype:
            raise GateError(f"{candidate}: a gradient in {got[0].dtype}")
        return {"error": error, "bound": bound}


def _merge(backend: str, inputs: MergeInputs) -> Outputs:
    return tuple(merge_tokens(*inputs, backend=backend))


def _peer(inputs: MergeInputs) -> Outputs:
    owner, means = kmeans.grouped(*inputs)
    mass = torch.nn.functional.one_hot(owner.long(), inputs.indices.shape[1]).sum(dim=1).float()
    return means, mass, owner


def _spread(inputs: SpreadInputs) -> Outputs:
    """As autograd differentiates the reference."""
    share = inputs.grad.to(torch.promote_types(inputs.grad.dtype, torch.float32)) / inputs.mass[:, :, None]
    where = inputs.owner[:, :, None].expand(-1, -1, share.shape[2])
    return (torch.where(inputs.mass[:, :, None] > 0, share, 0.0).gather(1, where).to(inputs.grad.dtype),)


_MERGE = (
    Candidate("ours", lambda case: lambda i: _merge("triton", i), why_not=where_kernels_run),
    Candidate("reference", lambda case: lambda i: _merge("torch", i)),
    Candidate(
        PEER,
        lambda case: _peer,
        modes=("eager",),
        why_not=kmeans.why_not,
        note="products in 16 bit; it does not count, and PyTorch does that for it",
    ),
    Candidate("compiled", lambda case: compiled(lambda i: _merge("torch", i)), compiled=True),
)
_SPREAD = (
    Candidate("ours", lambda case: lambda i: (op.spread_rows(*i),), why_not=where_kernels_run),
    Candidate("reference", lambda case: _spread),
    Candidate("compiled", lambda case: compiled(_spread), compiled=True),
)


def merge_cases() -> list[MergeCase]:
    """LLaVA-1.5's images, one and many, and LLaVA-NeXT's."""
    return [MergeCase(*sizes) for sizes in _sizes()]


def spread_cases() -> list[SpreadCase]:
    """The same sizes, backwards."""
    return [SpreadCase(*sizes) for sizes in _sizes()]


def _sizes() -> list[tuple[str, int, torch.dtype, int, int]]:
    if bench_device().type != "cuda":
        return [("llava-64", 1, torch.float32, 64, 576), ("next-160", 1, torch.float32, 160, 720)]
    shapes = (
        ("llava-64", 1, 64, 576),
        ("llava-64", 8, 64, 576),
        ("llava-64", 64, 64, 576),
        ("next-160", 8, 160, 2880),
    )
    return [(name, batch, torch.float16, keep, tokens) for name, batch, keep, tokens in shapes]
