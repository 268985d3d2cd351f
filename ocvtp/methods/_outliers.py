"""How many scores stand out, by the rule that TRIM and PruMerge share."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import wide


def outliers(scores: torch.Tensor) -> int:
    """How many of all ``scores`` lie above the third quartile by more than 1.5 interquartile ranges.

    Quartiles are interpolated linearly. Waits for a GPU.

    Raises:
        ValueError: there are no scores.
    """
    if scores.numel() == 0:
        raise ValueError(f"without tokens none stands out; got scores {list(scores.shape)}")
    flat = wide(scores).flatten().sort().values
    low, high = (_quantile(flat, share) for share in (0.25, 0.75))
    return int((flat > high + 1.5 * (high - low)).sum())


def _quantile(ascending: torch.Tensor, share: float) -> torch.Tensor:
    # torch.quantile refuses more than 2**24 values.
    at = share * (len(ascending) - 1)
    below = int(at)
    return torch.lerp(ascending[below], ascending[min(below + 1, len(ascending) - 1)], at - below)
