"""Received attention in plain PyTorch, a block of queries at a time."""

from __future__ import annotations

import torch

# Queries per block: bounds the live attention map to [B, H, 128, N] whatever the image size.
_BLOCK = 128


def received_attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """See :func:`ocvtp_kernels.received_attention.received_attention`."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    heads, queries = q.shape[1], q.shape[2]
    keys = k.to(dtype).transpose(-1, -2)
    received = k.new_zeros(k.shape[0], k.shape[2], dtype=dtype)
    for start in range(0, queries, _BLOCK):
        logits = (q[:, :, start : start + _BLOCK].to(dtype) * scale) @ keys
        received += logits.softmax(dim=-1).sum(dim=(1, 2))
    return received / (heads * queries)
