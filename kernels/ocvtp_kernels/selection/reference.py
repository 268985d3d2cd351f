"""Token selection in plain PyTorch: batched, no host synchronisation, static output shapes."""

from __future__ import annotations

import torch


def select_tokens(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_tokens`."""
    scores = slot_attention.amax(dim=1) if fill_scores is None else fill_scores
    return _select(slot_attention.argmax(dim=2), keep, scores)  # ties: the lowest index


def select_from_keys(
    keys: torch.Tensor, keep: int, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_from_keys`."""
    return _select(0x7FFFFFFF - (keys.amax(dim=1) & 0x7FFFFFFF), keep, scores)


def _select(top_token: torch.Tensor, keep: int, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank tokens by (is in ``top_token`` ``[B, K]``, score ``[B, N]``, lower index); the first ``keep``."""
    # What is written to is made like the indices: under vmap either may be the same for all.
    picked = top_token.new_zeros(scores.shape, dtype=torch.bool).scatter_(1, top_token, True)

    # A stable sort by score puts equal scores in index order; moving the picks to the front of that
    # order is a partition, so two running counts give every token its final rank without a second sort.
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    picked_in_order = picked.gather(1, by_score)
    picks_so_far = picked_in_order.cumsum(1)
    others_so_far = (~picked_in_order).cumsum(1)
    total_picks = picks_so_far[:, -1:]
    rank = torch.where(picked_in_order, picks_so_far, total_picks + others_so_far) - 1

    order = torch.empty_like(rank).scatter_(1, rank, by_score)
    indices = order[:, :keep].sort(dim=1).values
    return indices, total_picks[:, 0].clamp(max=keep)


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`ocvtp_kernels.selection.gather_tokens`."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))
