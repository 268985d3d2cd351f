"""Calls that bring embeddings in the place of token ids, as those behind trained prompts do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ocvtp.vlm.call.handover import embed
from ocvtp.vlm.contracts.adapter import Adapter


def ids_behind(adapter: Adapter, embeddings: torch.Tensor, calling: Sequence[Any]) -> torch.Tensor:
    """Token ids ``[B, S]`` as far as pruning needs them: placeholders, and something else.

    Placeholders are found as transformers finds them: by the embedding of theirs.

    Args:
        adapter: of the model.
        embeddings: ``[B, S, D]``.
        calling: modules whose calls are under way.
    """
    tokens = {adapter.token_id(modality) for modality in adapter.pixel_keys}
    other = next(token for token in range(len(tokens) + 1) if token not in tokens)
    ids = torch.full(embeddings.shape[:2], other, device=embeddings.device)
    with torch.no_grad():
        for token in tokens:
            own = embed(adapter, torch.tensor([token], device=embeddings.device), calling).to(embeddings)
            ids = ids.masked_fill((embeddings == own).all(-1), token)
    return ids


def short_embeddings(
    adapter: Adapter,
    embeddings: torch.Tensor,
    columns: torch.Tensor,
    ids: torch.Tensor,
    scattered: torch.Tensor | None,
) -> torch.Tensor:
    """The caller's embeddings ``[B, short, D]`` of the columns that stay; nothing in padding.

    Args:
        adapter: of the model.
        embeddings: ``[B, S, D]``.
        columns: ``[B, short]``, -1 for padding.
        ids: ``[B, short]``.
        scattered: ``[B, short, D]`` with the kept rows in the places of placeholders, where they are handed
            over like that.
    """
    index = columns.clamp(min=0)[..., None].expand(-1, -1, embeddings.shape[-1])
    taken = embeddings.gather(1, index).masked_fill((columns < 0)[..., None], 0)
    if scattered is None:
        return taken
    for modality in adapter.pixel_keys:
        here = (ids == adapter.token_id(modality))[..., None]
        taken = torch.where(here, scattered.to(taken), taken)
    return taken
