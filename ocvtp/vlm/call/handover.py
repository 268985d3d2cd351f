"""How the kept rows reach the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.rows import KeptRows
from ocvtp.vlm.contracts.settings import Route, Settings
from ocvtp.vlm.contracts.weights import inside


def route_of(model: Any) -> Route:
    """``mm_encoder_outputs`` where the model accepts it (transformers >= 5.18), else ``inputs_embeds``.

    With the former, ``generate`` handles pruned features as it handles its own: beams, assistants and
    chunked prefill included.
    """
    parameters = inspect.signature(type(model).forward).parameters
    return "mm_encoder_outputs" if "mm_encoder_outputs" in parameters else "inputs_embeds"


def hand_over(
    arguments: dict[str, Any],
    adapter: Adapter,
    settings: Settings,
    ids: torch.Tensor,
    kept: Mapping[str, KeptRows],
    start: int,
    calling: Sequence[Any],
) -> None:
    """Add the kept rows to ``arguments``.

    Args:
        arguments: of the call to be made; changed in place.
        adapter: of the model.
        settings: of the call.
        ids: ``[B, S]`` short ids.
        kept: rows by modality.
        start: placeholders before this column are in the cache already.
        calling: modules whose calls are under way.
    """
    if settings.route == "mm_encoder_outputs":
        arguments["mm_encoder_outputs"] = {
            modality: adapter.output(rows, modality) for modality, rows in kept.items()
        }
        return
    embeddings = embed(adapter, ids, calling)
    for modality, rows in kept.items():
        where = ids == adapter.token_id(modality)
        where[:, :start] = False
        where = where[..., None].to(embeddings.device)
        embeddings = embeddings.masked_scatter(where, rows.flat().to(embeddings))
    arguments["inputs_embeds"] = embeddings


def embed(adapter: Adapter, ids: torch.Tensor, calling: Sequence[Any]) -> torch.Tensor:
    """Embeddings of ``ids``, inside of the calls that bring their weights but for those under way."""
    model = adapter.model
    around = [model, model.model, model.get_decoder()]
    embeddings: torch.Tensor = inside(around, model.get_input_embeddings(), ids, calling=calling)
    return embeddings
