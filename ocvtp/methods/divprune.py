"""DivPrune: the most different tokens, each time the one farthest from all that are kept."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import check_features, check_tensor, chosen, cosines
from ocvtp.selection import Selection

#: A distance below this is what rounding makes of copies.
EPS = 1e-6


@torch.no_grad()
def divprune(projected: torch.Tensor, keep: int) -> Selection:
    """The tokens of :func:`divprune_order`.

    Args:
        projected: ``[B, N, D]`` finite floating point: what enters the language model.
        keep: tokens to keep, ``1 <= keep <= N``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    return chosen(divprune_order(projected, keep), projected.shape[1])


@torch.no_grad()
def divprune_order(projected: torch.Tensor, keep: int) -> torch.Tensor:
    """Farthest points by cosine distance, from the token whose nearest other one is farthest.

    DivPrune, arXiv 2503.02175. Distances are 1 - cosine, in at least float32, and those below 1e-6 are 0.
    What is kept is masked, and of equal distances the lowest index wins. But for its start and for rounding
    it is :func:`ocvtp_kernels.diversity.farthest_points` of normalised tokens, whose squared distance is
    twice this one.

    Args:
        projected: ``[B, N, D]`` finite floating point.
        keep: tokens to keep, ``1 <= keep <= N``.

    Returns:
        ``[B, keep]`` int64 in the order of choice, unique per row; the first k are those of ``keep=k``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    keep = check_features(projected, keep)
    check_tensor("projected", projected, (None, None, None), "[B, N, D]", projected)
    # N x N, which is less than the tokens themselves as long as N is below D; rounds then only look up.
    similar = cosines(projected)
    similar = torch.where(similar > 1.0 - EPS, 1.0, similar)
    alone = torch.eye(projected.shape[1], dtype=torch.bool, device=projected.device)
    nearest = similar.masked_fill(alone, -2.0).amax(dim=2)
    order = []
    for i in range(keep):
        token = nearest.argmin(dim=1, keepdim=True)
        order.append(token)
        row = similar.gather(1, token[:, :, None].expand(-1, 1, similar.shape[2]))[:, 0]
        # Above any cosine, so that even copies of what is kept come before it.
        nearest = (torch.maximum(nearest, row) if i else row).scatter(1, token, 3.0)
    return torch.cat(order, dim=1)
