"""How the published OC-VTP code computes, restated by us: the baseline our speed is measured against.

Slot Attention runs as modules do, with all three slot updates; then Python lists on the host choose the
tokens of one image at a time. Facts from the official repository (arXiv 2511.20439); none of its code.
"""

from __future__ import annotations

import torch

from ocvtp_kernels.slot_attention import SlotAttentionWeights, reference


@torch.no_grad()
def official_attention(features: torch.Tensor, slots: torch.Tensor, w: SlotAttentionWeights) -> torch.Tensor:
    """``[B, N, C]``, ``[B or 1, K, D]`` -> ``[B, K, N]``: every layer, projection and update as published."""
    encoded = reference.encode(features, w)
    _, attention = reference.slot_attention(
        encoded, slots, w, num_iters=3, eps=1e-5, truncate=False, dropout=0.0
    )
    return attention


def official_selection(slot_attention: torch.Tensor, received: torch.Tensor, keep: int) -> list[int]:
    """Kept tokens of one image, chosen on the host.

    ``slot_attention`` ``[1, K, N]`` and ``received`` ``[N]``. The official loops test membership in a list
    and in a set rebuilt for every element, so the cost grows with the square of ``N``.
    """
    chosen = set(torch.topk(slot_attention, k=1, dim=2).indices.flatten().tolist())
    kept = sorted(list(chosen)[:keep])
    if len(kept) < keep:
        ranking = torch.argsort(-received)
        pool = [token for token in range(received.numel()) if token not in set(kept)]
        kept = kept + [token for token in ranking.tolist() if token in pool][: keep - len(kept)]
    return sorted(kept)
