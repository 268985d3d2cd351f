"""What rotary embedding alone makes of attention at a distance, which SparseVLM v2 divides by."""

from __future__ import annotations

import math

import torch


def gravity(distance: torch.Tensor, frequencies: torch.Tensor, floor: float | None) -> torch.Tensor:
    """The logit of a query of ones with a key of ones ``distance`` away: ``2 / sqrt(d) * sum(cos)``.

    It turns negative from distance 1707 on for ``d = 128`` and theta 1e4, 725 for ``d = 64``: what is divided
    by it would change its sign, and near there grow without bound. The published code does so.

    Args:
        distance: any shape, whole numbers.
        frequencies: ``[d / 2]`` inverse frequencies.
        floor: the least share of the value at distance 0 to go down to; ``None``: as published.

    Returns:
        float32 of the shape of ``distance``.
    """
    angles = distance[..., None].double() * frequencies.double()
    pull = angles.cos().sum(-1) * (2 / math.sqrt(2 * frequencies.shape[0]))
    if floor is not None:
        pull = pull.clamp(min=floor * math.sqrt(2 * frequencies.shape[0]))
    return pull.float()
