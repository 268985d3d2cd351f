"""Received attention in plain PyTorch, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Queries per block: bounds the live attention map to [B, H, 128, N] whatever the image size.
_BLOCK = 128


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`ocvtp_kernels.received_attention.received_attention`."""
    dtype = _compute_dtype(q, k)
    keys = k.to(dtype)
    received = k.new_zeros(k.shape[0], k.shape[2], dtype=dtype)
    for block in _blocks(q):
        attention = _attention(q[:, :, block].to(dtype), keys, scale, lse, cu_seqlens, block)
        received += attention.sum(dim=(1, 2))
    return received * _weight(q, dtype, cu_seqlens)


def received_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of :func:`received_attention` with respect to ``q``, ``k`` and, if given, ``lse``.

    With P the attention map and w the incoming gradient over the number of rows averaged, the logits'
    gradient is P (w - P w) by the softmax, and P w alone where the log-sum-exp is an input.
    """
    dtype = _compute_dtype(q, k)
    keys = k.to(dtype)
    weight = (grad.to(dtype) * _weight(q, dtype, cu_seqlens))[:, None, None, :]
    grad_q, grad_lse = torch.empty_like(q), None if lse is None else torch.empty_like(lse)
    grad_k = torch.zeros_like(keys)
    for block in _blocks(q):
        queries = q[:, :, block].to(dtype)
        attention = _attention(queries, keys, scale, lse, cu_seqlens, block)
        grad_logits = attention * weight
        row = grad_logits.sum(dim=-1, keepdim=True)
        if grad_lse is None:
            grad_logits = grad_logits - attention * row
        else:
            grad_lse[:, :, block] = -row[..., 0].to(grad_lse.dtype)
        grad_q[:, :, block] = (grad_logits @ keys * scale).to(q.dtype)
        grad_k += grad_logits.mT @ queries * scale
    return grad_q, grad_k.to(k.dtype), grad_lse


def _compute_dtype(q: torch.Tensor, k: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)


def _blocks(q: torch.Tensor) -> Iterator[slice]:
    for start in range(0, q.shape[2], _BLOCK):
        yield slice(start, start + _BLOCK)


def _attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    block: slice,
) -> torch.Tensor:
    """The attention map of one block of queries, ``[B, H, block, N]``."""
    logits = (queries * scale) @ keys.mT
    if cu_seqlens is not None:
        segment = _segments(cu_seqlens, keys.shape[2])
        logits = logits.masked_fill(segment[block, None] != segment, -torch.inf)
    if lse is None:
        return logits.softmax(dim=-1)
    return (logits - lse[:, :, block, None].to(logits.dtype)).exp()


def _weight(q: torch.Tensor, dtype: torch.dtype, cu_seqlens: torch.Tensor | None) -> torch.Tensor | float:
    """One over the number of rows that each column's mean is taken of: heads times queries."""
    heads, queries = q.shape[1], q.shape[2]
    if cu_seqlens is None:
        return 1.0 / (heads * queries)
    lengths = cu_seqlens.diff()[_segments(cu_seqlens, queries)]
    return 1.0 / (heads * lengths).to(dtype)


def _segments(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which segment each token belongs to, ``[tokens]``."""
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)
