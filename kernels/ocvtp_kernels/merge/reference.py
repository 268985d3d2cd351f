"""Merging tokens into kept ones in plain PyTorch: the oracle."""

from __future__ import annotations

import torch

from ocvtp_kernels._nearest_reference import centred, nearest


def nearest_kept(compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Owners ``[B, N]`` int64; see :func:`ocvtp_kernels.merge.nearest_kept`."""
    return nearest(centred(compare), indices, mask)


def masses(owner: torch.Tensor, keep: int) -> torch.Tensor:
    """How many tokens each of ``keep`` owns, ``[B, keep]`` float32."""
    ones = torch.ones(owner.shape, dtype=torch.float32, device=owner.device)
    return _sums(ones, owner, keep)


def merge_by(x: torch.Tensor, owner: torch.Tensor, keep: int) -> torch.Tensor:
    """See :func:`ocvtp_kernels.merge.merge_by`."""
    total = _sums(x.to(torch.promote_types(x.dtype, torch.float32)), owner, keep)
    mass = masses(owner, keep).to(total.dtype)
    return (total / mass.clamp(min=1.0)[:, :, None]).to(x.dtype)


def _sums(x: torch.Tensor, owner: torch.Tensor, keep: int) -> torch.Tensor:
    """Sum of ``x`` ``[B, N, ...]`` over each owner's tokens, in their order: on a GPU too, where
    ``index_add`` would be atomic.
    """
    images = torch.arange(owner.shape[0], device=owner.device)[:, None].expand(owner.shape)
    nothing = torch.zeros((owner.shape[0], keep, *x.shape[2:]), dtype=x.dtype, device=x.device)
    return nothing.index_put((images, owner), x, accumulate=True)
