"""Token selection in plain PyTorch: batched, no host synchronisation, static output shapes."""

from __future__ import annotations

import torch


def select_tokens(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_tokens`."""
    batch, _, tokens = slot_attention.shape
    device = slot_attention.device
    top_token = slot_attention.argmax(dim=2)  # ties: the lowest index
    picked = torch.zeros(batch, tokens, dtype=torch.bool, device=device).scatter_(1, top_token, True)
    scores = slot_attention.amax(dim=1) if fill_scores is None else fill_scores.to(device)

    # A stable sort by score puts equal scores in index order; moving the picks to the front of that
    # order is a partition, so two running counts give every token its final rank without a second sort.
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    picked_in_order = picked.gather(1, by_score)
    picks_so_far = picked_in_order.cumsum(1)
    others_so_far = (~picked_in_order).cumsum(1)
    total_picks = picks_so_far[:, -1:]
    rank = torch.where(picked_in_order, picks_so_far, total_picks + others_so_far) - 1

    order = torch.empty_like(by_score).scatter_(1, rank, by_score)
    indices = order[:, :keep].sort(dim=1).values
    return indices, total_picks[:, 0].clamp(max=keep)


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`ocvtp_kernels.selection.gather_tokens`."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))
