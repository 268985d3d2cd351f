"""VisPruner: half of the budget by class attention, half by dropping likenesses from what is left."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import best, check_features, check_share, check_tensor, chosen, cosines
from ocvtp.selection import Selection
from ocvtp_kernels._checks import as_int


@torch.no_grad()
def vispruner(
    features: torch.Tensor, class_row: torch.Tensor, keep: int, *, important: float = 0.5, step: int = 8
) -> Selection:
    """The tokens of :func:`vispruner_order`.

    Args:
        features: ``[B, N, C]`` finite floating point: the tower's patches, before any projector.
        class_row: ``[B, N]`` finite floating point, how much the class token attends to each.
        keep: tokens to keep, ``1 <= keep <= N``.
        important: share of the budget, from 0 to 1, that attention chooses.
        step: tokens to drop in a round, at least 1.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget, share or step, or NaN or Inf.
    """
    return chosen(
        vispruner_order(features, class_row, keep, important=important, step=step), features.shape[1]
    )


@torch.no_grad()
def vispruner_order(
    features: torch.Tensor, class_row: torch.Tensor, keep: int, *, important: float = 0.5, step: int = 8
) -> torch.Tensor:
    """The most attended tokens, and of the others those that are left when the most alike are dropped.

    VisPruner, arXiv 2412.01818. The others start in the order of attention. Every round takes them by turns
    into two halves and drops the ``step`` tokens of the first that are most like any of the second; next come
    those left of the first, most alike first, and then the second half as it was. With an odd number the
    first half has one more, and a round drops no more than that half.

    That order is part of the method and makes it chaotic: one swap of near equals changes the halves of all
    that follow. Rounding decides which tokens are kept, and half-precision features give other tokens than
    the float32 ones they were rounded from. Similarities are computed once, image by image and in at least
    float32, so that the batch at least decides nothing; give float64 to compare with another implementation.

    Args:
        features: ``[B, N, C]`` finite floating point: the tower's patches, before any projector.
        class_row: ``[B, N]`` finite floating point, how much the class token attends to each, as a mean
            over heads.
        keep: tokens to keep, ``1 <= keep <= N``.
        important: share of the budget, from 0 to 1, that attention chooses.
        step: tokens to drop in a round, at least 1.

    Returns:
        ``[B, keep]`` int64, unique per row: ``int(keep * important)`` by attention, best first, then the
        others in the order of the last round.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget, share or step, or NaN or Inf.
    """
    keep = check_features(features, keep)
    batch, tokens, _ = features.shape
    check_tensor("features", features, (None, None, None), "[B, N, C]", features)
    check_tensor("class_row", class_row, (batch, tokens), "[B, N] of features", features)
    attended = int(keep * check_share("important", important))
    drop = as_int(step)
    if drop is None or drop < 1:
        raise ValueError(f"step must be an int of at least 1; got {step!r}")
    order = best(class_row, tokens)
    left = _diverse(features, order[:, attended:], keep - attended, drop)
    return torch.cat([order[:, :attended], left], dim=1)


def _diverse(features: torch.Tensor, order: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """``[B, keep]`` of the tokens ``order`` ``[B, R]``, in the order of the last round."""
    if keep == 0 or keep == order.shape[1]:
        return order[:, :keep]
    similar = cosines(features)
    while order.shape[1] > keep:
        first, second = order[:, ::2], order[:, 1::2]
        across = similar.gather(1, first[:, :, None].expand(-1, -1, similar.shape[2]))
        across = across.gather(2, second[:, None].expand(-1, first.shape[1], -1))
        ranked = first.gather(1, best(across.amax(dim=2), first.shape[1]))
        order = torch.cat([ranked[:, min(step, order.shape[1] - keep, first.shape[1]) :], second], dim=1)
    return order
