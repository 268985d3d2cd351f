"""Token selection in plain PyTorch: batched, no host synchronisation, static output shapes."""

from __future__ import annotations

import torch

from ocvtp_kernels.selection.shapes import ALLOW, GRID, even_rows


def select_tokens(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None, not_finite: int = ALLOW
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_tokens`."""
    scores = slot_attention.amax(dim=1) if fill_scores is None else fill_scores
    found = _select(slot_attention.argmax(dim=2), keep, scores)  # ties: the lowest index
    if not_finite == ALLOW:
        return found
    sound = is_finite(slot_attention)
    if fill_scores is not None:
        sound = sound & is_finite(fill_scores)
    return told(*found, sound, scores.shape[1], not_finite)


def select_from_keys(
    keys: torch.Tensor,
    keep: int,
    scores: torch.Tensor,
    finite: torch.Tensor | None = None,
    not_finite: int = ALLOW,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_from_keys`."""
    found = _select(0x7FFFFFFF - (keys.amax(dim=1) & 0x7FFFFFFF), keep, scores)
    if not_finite == ALLOW:
        return found
    assert finite is not None
    return told(*found, finite.all(dim=1) & is_finite(scores), scores.shape[1], not_finite)


def is_finite(x: torch.Tensor) -> torch.Tensor:
    """``[B]`` bool: whether there is no NaN and no Inf in each image of ``[B, ...]``."""
    # One reduction, which NaN and Inf survive, and a comparison that NaN fails.
    largest = torch.linalg.vector_norm(x.detach(), float("inf"), dim=tuple(range(1, x.ndim)))
    return largest < float("inf")


def told(
    indices: torch.Tensor, count: torch.Tensor, sound: torch.Tensor, tokens: int, not_finite: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A selection in which images that are not ``sound`` ``[B]`` say so."""
    if not_finite == GRID:
        even = evenly(tokens, indices.shape[1], indices.device)
        indices = torch.where(sound[:, None], indices, even)
    return indices, torch.where(sound, count, -1)


def evenly(tokens: int, keep: int, device: torch.device) -> torch.Tensor:
    """``[keep]`` int64, ascending: tokens spread evenly, see :func:`even_rows`."""
    width, down = even_rows(tokens, keep)
    t = torch.arange(keep, device=device)
    row = ((t + 1) * down - 1) // keep
    first = keep * row // down
    across = keep * (row + 1) // down - first
    y = (2 * row + 1) * (tokens // width) // (2 * down)
    return y * width + (2 * (t - first) + 1) * width // (2 * across)


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
