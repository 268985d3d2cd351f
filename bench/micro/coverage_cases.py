"""One round of refinement: shapes, inputs, float64 oracle, gates, candidates.

The peer, flash-kmeans, does the nearest that there is to buy: one iteration of k-means. It assigns tokens and
moves centres to means, so it names no tokens to keep and nothing keeps its error from rising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.micro.case import Candidate, Case, Gate, bench_device, compiled, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.clusters import clustered, some_tokens
from bench.micro.gates import GateError, Outputs, require_equal, require_error, worst_error
from bench.micro.kmeans import LOOSE, PEER, grouped, why_not
from ocvtp_kernels.coverage import coverage_error, reference, refine

_INDEX = 8  # bytes
#: Two tokens may be equally near a mean but for rounding, and either be taken: of the error after a round.
_ROUNDING = 1e-3
#: An image with a decision closer than this, of what is compared, may end in other tokens. Measured on a CPU,
#: float32 errs a sixth of it; a cluster of two is decided by ``reference.STEADY``, four times as much.
_NEAR = 2.0**-18


class RoundInputs(NamedTuple):
    """``[B, N, C]`` and ``[B, T]``."""

    x: torch.Tensor
    indices: torch.Tensor


class RoundExpected(NamedTuple):
    """In float64: the features, coverage error ``[B]`` before and after, the means ``[B, T, C]`` of what was
    assigned, the tokens ``[B, T]`` kept, and whether no decision was near, ``[B]``."""

    x: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    means: torch.Tensor
    kept: torch.Tensor
    untied: torch.Tensor


@dataclass(frozen=True)
class RoundCase(Case[RoundInputs, RoundExpected]):
    """``refine`` with one round."""

    keep: int
    tokens: int
    width: int = 1024

    op = "refine"
    family = "coverage"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "N": self.tokens, "C": self.width, "T": self.keep}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _CANDIDATES

    def work(self, candidate: str) -> Work:
        """Features once; products to assign and for the means, and for ours to assign anew."""
        size = torch.empty((), dtype=self.dtype).element_size()
        rows = self.batch * self.tokens * self.width
        kept = self.batch * self.keep * _INDEX
        if candidate == PEER:
            centres = self.batch * self.keep * self.width * size
            return Work(rows * size + centres, centres, flops=4 * rows * self.keep)
        return Work(rows * size + kept, kept, flops=6 * rows * self.keep, arithmetic="fp32")

    def draw(self, seed: int, device: torch.device) -> RoundInputs:
        """Tokens around as many centres as are kept; the kept ones at random, ascending."""
        generator = torch.Generator(device).manual_seed(seed)
        x = clustered(generator, self.batch, self.tokens, self.width, self.keep)
        kept = some_tokens(generator, self.batch, self.tokens, self.keep)
        return RoundInputs(x.to(self.dtype), kept)

    def expect(self, inputs: RoundInputs) -> RoundExpected:
        """The reference in float64."""
        x = inputs.x.double()
        z = reference.centred(x)
        covered = reference.cover(z, inputs.indices)
        member = torch.nn.functional.one_hot(covered.owner, self.keep).double()
        means = member.mT @ x / member.sum(dim=1)[:, :, None]
        kept = refine(x, inputs.indices, 1, backend="torch")
        after = coverage_error(x, kept, backend="torch")
        # Whether an image moves is decided by this, and one that doesn't may have been about to.
        moves = after < covered.error * (1 - _ROUNDING)
        untied = moves & _assigned_clearly(z, inputs.indices) & _chosen_clearly(x, means, inputs, member)
        return RoundExpected(x, covered.error, after, means, kept, untied)

    def check(self, candidate: str, got: Outputs, expected: RoundExpected) -> Gate:
        """No image's error rises, it falls as far as the oracle's, and where nothing was near a tie the same
        tokens are kept; the peer: its means."""
        if candidate == PEER:
            error = worst_error(got[0].flatten(1), expected.means.flatten(1))
            require_error(candidate, error, LOOSE)
            return {"error": error, "bound": LOOSE}
        kept = got[0]
        if kept.shape != (self.batch, self.keep) or kept.dtype != torch.int64:
            raise GateError(f"{candidate}: {kept.dtype} {list(kept.shape)}")
        if int(kept.min()) < 0 or int(kept.max()) >= self.tokens or not (kept.diff(dim=1) > 0).all():
            raise GateError(f"{candidate}: kept tokens are not ascending, unique and of the image")
        after = coverage_error(expected.x, kept, backend="torch")
        if not (after <= expected.before * (1 + _NEAR)).all():
            raise GateError(f"{candidate}: an image's coverage error rose")
        error = worst_error(after[:, None], expected.after[:, None])
        require_error(candidate, error, _ROUNDING)
        untied = expected.untied
        require_equal(f"{candidate}: kept tokens", kept[untied], expected.kept[untied])
        return {"error": error, "bound": _ROUNDING, "images_compared_by_token": int(untied.sum())}


def _assigned_clearly(z: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Whether no token of an image is about as near to a second kept one, ``[B]``."""
    kept = z.gather(1, indices[:, :, None].expand(-1, -1, z.shape[2]))
    scores = kept.square().sum(dim=2)[:, None, :] - 2.0 * z @ kept.mT  # [B, N, T]
    nearest = scores.topk(2, dim=2, largest=False).values
    # A kept token is its own.
    gap = (nearest[:, :, 1] - nearest[:, :, 0]).scatter(1, indices, torch.inf)
    return gap.amin(dim=1) > _NEAR * z.square().sum(dim=2).mean(dim=1)


def _chosen_clearly(
    x: torch.Tensor, means: torch.Tensor, inputs: RoundInputs, member: torch.Tensor
) -> torch.Tensor:
    """Whether no cluster of an image has a second token about as near its mean, ``[B]``."""
    away = (x - member @ means).square().sum(dim=2)
    steady = torch.ones_like(away).scatter(1, inputs.indices, reference.STEADY)
    of_cluster = torch.where(member > 0, (away * steady)[:, :, None], torch.inf)  # [B, N, T]
    first, second = of_cluster.topk(2, dim=1, largest=False).values.unbind(dim=1)
    return (second - first > _NEAR * first).all(dim=1)


def _round(backend: str, inputs: RoundInputs) -> Outputs:
    return (refine(*inputs, 1, backend=backend),)


_CANDIDATES = (
    Candidate("ours", lambda case: lambda i: _round("triton", i), why_not=where_kernels_run),
    Candidate("reference", lambda case: lambda i: _round("torch", i)),
    Candidate(
        PEER,
        lambda case: lambda i: (grouped(*i)[1],),
        modes=("eager",),
        why_not=why_not,
        note="assignment and means alone: picks no tokens, guarantees nothing",
    ),
    Candidate("compiled", lambda case: compiled(lambda i: _round("torch", i)), compiled=True),
)


def round_cases() -> list[RoundCase]:
    """LLaVA-1.5's images, one and many, and LLaVA-NeXT's."""
    if bench_device().type != "cuda":
        return [
            RoundCase("llava-64", 1, torch.float32, 64, 576),
            RoundCase("next-160", 1, torch.float32, 160, 720),
        ]
    return [
        RoundCase(name, batch, torch.float16, keep, tokens)
        for name, batch, keep, tokens in (
            ("llava-64", 1, 64, 576),
            ("llava-64", 8, 64, 576),
            ("llava-64", 64, 64, 576),
            ("next-160", 8, 160, 2880),
        )
    ]
