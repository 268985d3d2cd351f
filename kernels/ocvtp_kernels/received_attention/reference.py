"""Received attention in plain PyTorch, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ocvtp_kernels._alike import laid_out

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
    queries, keys = laid_out(q, dtype), laid_out(k, dtype)
    blocks = _blocks(q)

    def received(block: slice) -> torch.Tensor:
        attention = _attention(queries[:, :, block], keys, scale, lse, cu_seqlens, block)
        return attention.sum(dim=(1, 2))

    total = received(next(blocks))  # not zeros: under vmap they would be the same for all
    for block in blocks:
        total += received(block)
    return total * _weight(q, dtype, cu_seqlens)


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
    of_q: list[torch.Tensor] = []
    of_lse: list[torch.Tensor] = []
    of_k: torch.Tensor | None = None
    for block in _blocks(q):
        queries = q[:, :, block].to(dtype)
        attention = _attention(queries, keys, scale, lse, cu_seqlens, block)
        grad_logits = attention * weight
        row = grad_logits.sum(dim=-1, keepdim=True)
        if lse is None:
            grad_logits = grad_logits - attention * row
        else:
            of_lse.append(-row[..., 0].to(lse.dtype))
        of_q.append((grad_logits @ keys * scale).to(q.dtype))
        part = grad_logits.mT @ queries * scale
        of_k = part if of_k is None else of_k.add_(part)
    assert of_k is not None
    return torch.cat(of_q, dim=2), of_k.to(k.dtype), torch.cat(of_lse, dim=2) if of_lse else None


def received_attention_jvp(
    q_tangent: torch.Tensor,
    k_tangent: torch.Tensor,
    lse_tangent: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """Tangent of :func:`received_attention`, ``[B, N]``, of those of ``q``, ``k`` and, if given, ``lse``.

    With P the attention map and t the logits' tangent, that of P is P (t - P t) by the softmax, and
    P (t - lse's) where the log-sum-exp is an input.
    """
    dtype = _compute_dtype(q, k)
    keys, of_keys = k.to(dtype), k_tangent.to(dtype)
    blocks = _blocks(q)

    def tangent(block: slice) -> torch.Tensor:
        queries = q[:, :, block].to(dtype)
        attention = _attention(queries, keys, scale, lse, cu_seqlens, block)
        logits = (q_tangent[:, :, block].to(dtype) @ keys.mT + queries @ of_keys.mT) * scale
        if lse is None:
            row = (attention * logits).sum(dim=-1, keepdim=True)
        else:
            assert lse_tangent is not None
            row = lse_tangent[:, :, block, None].to(dtype)
        return (attention * (logits - row)).sum(dim=(1, 2))

    total = tangent(next(blocks))
    for block in blocks:
        total = total + tangent(block)
    return total * _weight(q, dtype, cu_seqlens)


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
    lengths = cu_seqlens.diff()
    # Beyond the last bound there is no segment. Nor is there a sense in the others then: NaN, as kernels say.
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == queries) & (lengths >= 0).all()
    lengths = lengths[_segments(cu_seqlens, queries).clamp(max=len(lengths) - 1)]
    return torch.where(right, 1.0 / (heads * lengths).to(dtype), torch.nan)


def _segments(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which segment each token belongs to, ``[tokens]``."""
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)
