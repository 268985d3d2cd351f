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


def official_rows(
    slot_attention: torch.Tensor, received: torch.Tensor, x: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept tokens ``[B, keep]`` and their rows ``[B, keep, C]``, one image at a time."""
    indices, rows = [], []
    for image in range(x.shape[0]):
        kept = official_selection(slot_attention[image : image + 1], received[image], keep)
        indices.append(torch.tensor(kept, device=x.device))
        rows.append(x[image].index_select(0, indices[-1]))
    return torch.stack(indices), torch.stack(rows)


def official_received(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, H, N, d]`` twice -> ``[B, N]``: attention received in one layer of an eager-attention tower.

    As transformers computes it: the map materialised in the tower's dtype but for a float32 softmax, packed
    images one after another, their lengths read on the host; then averaged over heads, and over queries, in
    the tower's dtype. Left out: the published code has every layer keep its map (``output_attentions``), and
    this layer goes on to multiply its map by the values.
    """
    if cu_seqlens is None:
        return _map(q, k).mean(dim=1).mean(dim=1)
    lengths = cu_seqlens.diff().tolist()
    segments = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), strict=True)
    return torch.cat([_map(*segment).mean(dim=1).mean(dim=1) for segment in segments], dim=1)


def _map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    logits = torch.matmul(q, k.mT) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
