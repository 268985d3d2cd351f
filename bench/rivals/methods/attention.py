"""Attention scores from stored queries and keys, by the product's operation."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from ocvtp_kernels.received_attention import received_attention

#: Heads of the tower in ``tower_clip``.
HEADS = 4


def heads(x: torch.Tensor) -> torch.Tensor:
    """``[B, tokens, C]`` -> ``[B, H, tokens, C / H]``."""
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def class_row(case: Case, block: int) -> torch.Tensor:
    """``[B, N]``: mean over heads of the class token's row in a block of ``tower_clip``."""
    tower = case.beside("tower_clip")
    q, k = heads(tower[f"q_{block}"]), heads(tower[f"k_{block}"])
    return received_attention(q[:, :, :1], k)[:, 1:]


def column_means(case: Case, block: int) -> torch.Tensor:
    """``[B, N]``: what each patch receives in a block of ``tower_clip``, mean over heads and queries."""
    tower = case.beside("tower_clip")
    return received_attention(heads(tower[f"q_{block}"]), heads(tower[f"k_{block}"]))[:, 1:]


def merged_sums(q: torch.Tensor, k: torch.Tensor, window_index: torch.Tensor) -> torch.Tensor:
    """``[N]``: what each merged token's four patches receive on average, summed over queries; raster order.

    ``q`` and ``k`` are ``[patches, H, d]`` in window order.
    """
    received = received_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None])[0] * len(q)
    return received.reshape(-1, 4).mean(dim=1)[window_index.argsort()]
