"""Coverage of kept tokens and its refinement in plain PyTorch: the oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ocvtp_kernels._nearest_reference import centred, nearest, rows_at

#: To replace a kept token, another's squared distance to their mean must be less than this share of its own.
#: Of two tokens both are equally near, and rounding must not decide.
STEADY = 1.0 - 2.0**-16
#: Taken off it, too, so that it stays where both are zero.
LEAST = 1e-30


class Covered(NamedTuple):
    """How a kept set covers an image.

    Attributes:
        owner: ``[B, N]`` int64, position among the kept of each token's nearest kept token.
        distance: ``[B, N]``, squared distance to it.
        error: ``[B]``, their sum over the image's own ``sum |x - mean|^2``.
    """

    owner: torch.Tensor
    distance: torch.Tensor
    error: torch.Tensor


def cover(z: torch.Tensor, indices: torch.Tensor) -> Covered:
    """Assign every token of centred ``z`` ``[B, N, C]`` to its nearest kept one; ties go to the first.

    A kept token is its own, even if another is equal. Which is nearest is found by products, how far it is by
    differences.
    """
    owner = nearest(z, indices)
    distance = (z - rows_at(rows_at(z, indices), owner)).square().sum(dim=2)
    total = z.square().sum(dim=(1, 2))
    # NaN must not become 0.
    error = torch.where(total == 0, 0.0, distance.sum(dim=1) / torch.where(total == 0, 1.0, total))
    return Covered(owner, distance, error)


def candidates(z: torch.Tensor, indices: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Of each kept token's tokens the one nearest their mean, ``[B, T]``.

    That is the member with the smallest sum of squared distances to all of them, which is the mean's and
    their number times its own to the mean. The kept token stays unless another is nearer by more than
    rounding; ties of others go to the lowest index.
    """
    kept = indices.shape[1]
    member = torch.nn.functional.one_hot(owner, kept).to(z.dtype)  # [B, N, T]
    means = member.transpose(1, 2) @ z / member.sum(dim=1)[:, :, None]
    away = (z - rows_at(means, owner)).square().sum(dim=2)
    is_kept = torch.zeros_like(away, dtype=torch.bool).scatter(1, indices, True)
    away = torch.where(is_kept, away * STEADY - LEAST, away)
    of_cluster = torch.where(member > 0, away[:, :, None], torch.inf)  # [B, N, T]
    return of_cluster.argmin(dim=1)


def refine(x: torch.Tensor, indices: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``rounds`` rounds of: assign, move to the candidates, keep what lowers the image's error.

    Kept tokens ``[B, T]``, sorted, and the error ``[B]``.
    """
    z = centred(x)
    covered = cover(z, indices)
    for _ in range(rounds):
        moved = candidates(z, indices, covered.owner)
        after = cover(z, moved)
        better = after.error < covered.error
        indices = torch.where(better[:, None], moved, indices)
        covered = Covered(
            torch.where(better[:, None], after.owner, covered.owner),
            torch.where(better[:, None], after.distance, covered.distance),
            torch.where(better, after.error, covered.error),
        )
    return indices.sort(dim=1).values, covered.error
