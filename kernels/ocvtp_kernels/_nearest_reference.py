"""Each token's nearest kept token, in plain PyTorch: the oracle of ``_nearest.py``."""

from __future__ import annotations

import torch

from ocvtp_kernels._alike import laid_out


def centred(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32, without each image's mean: distances are the same, and lose fewer digits."""
    x = laid_out(x, torch.promote_types(x.dtype, torch.float32))
    return x - x.mean(dim=1, keepdim=True)


def nearest(z: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Position among the kept of each token's nearest kept token, ``[B, N]`` int64; ties go to the first.

    A kept token is its own, even if another is equal; kept twice, the first has it. Distances that are no
    number are as far as can be, but nearer than a kept token that ``mask`` ``[B, T]`` takes out.

    Args:
        z: ``[B, N, C]``, centred.
        indices: ``[B, T]`` int64, kept tokens.
        mask: ``[B, T]`` bool, false for those that own nothing; ``None`` for all true.
    """
    kept = rows_at(z, indices)
    # A token's own norm is the same for every kept token, and left out.
    scores = kept.square().sum(dim=2)[:, None, :] - 2.0 * z @ kept.transpose(1, 2)  # [B, N, T]
    most = torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=most, posinf=most)
    scores = scores.scatter(1, indices[:, None, :], -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, :], torch.inf)
    return scores.argmin(dim=2)


def rows_at(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``x[b, indices[b, t]]``, ``[B, T, C]``."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))
