"""How the kept rows reach the model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ocvtp.vlm.adapter import Adapter, ImageRows, Route, Settings


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
    images: ImageRows,
    start: int,
) -> None:
    """Add the rows of ``images`` to ``arguments``.

    Args:
        arguments: of the call to be made; changed in place.
        adapter: of the model.
        settings: of the call.
        ids: ``[B, S]`` short ids.
        images: the kept rows.
        start: placeholders before this column are in the cache already.
    """
    if settings.route == "mm_encoder_outputs":
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output = BaseModelOutputWithPooling(pooler_output=list(images.rows))
        arguments["mm_encoder_outputs"] = {"image": output}
        return
    embeddings = adapter.model.get_input_embeddings()(ids)
    where = ids == adapter.image_token_id
    where[:, :start] = False
    rows = images.rows.flatten(0, 1).to(embeddings)
    arguments["inputs_embeds"] = embeddings.masked_scatter(where[..., None].to(embeddings.device), rows)
