"""What the language model got to see of a prompt, told afterwards by the cache that ``generate`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.methods.in_llm import averages
from ocvtp.vlm.call.controller import ATTRIBUTE, unwrap
from ocvtp.vlm.call.memory import note_of
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.in_llm.decoder import Decoder


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of every prompt of a batch.

    Attributes:
        read: ``[B]`` int64: prompt tokens that entered the language model.
        vision: ``[B]``: vision tokens of the long prompt. Whatever stands at an image placeholder counts:
            newlines between tiles and a class token too.
        kept: ``[B]``: those of them that entered the language model.
        in_layers: of each prompt, how many vision tokens go into a layer of the language model on average:
            ``kept``, unless a method inside it drops more.
    """

    read: torch.Tensor
    vision: torch.Tensor
    kept: torch.Tensor
    in_layers: tuple[float, ...]


def kept_columns(
    input_ids: torch.Tensor, cache: Any, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Which columns of a prompt the language model got to see.

        output = model.generate(**inputs, return_dict_in_generate=True)
        ocvtp.vlm.kept_columns(inputs["input_ids"], output.past_key_values)

    Args:
        input_ids: ``[B, S]``, the long prompt.
        cache: ``past_key_values`` of the output of a call on it, of ``generate`` or ``forward``, on a patched
            model or not. Rows of one prompt (beams) follow each other.
        attention_mask: ``[B, S]`` of the call; ``None``: nothing is padding.

    Returns:
        ``[B, S]`` bool, on the device of ``input_ids``. Rows that merged tokens stand at the place of one.

    Raises:
        ValueError: the cache holds other prompts.
    """
    live = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        live = attention_mask.to(input_ids.device).bool()
    note = note_of(cache)
    if note is None:  # nothing was dropped
        return live
    batch, length = input_ids.shape
    rows = len(note.index)
    if not rows or rows % batch or note.long < length:
        raise ValueError(
            f"the cache holds {rows} sequences of {note.long} tokens, input_ids has {batch} of {length}: "
            "they are not of one call"
        )
    index = note.index.to(input_ids.device)[:: rows // batch]
    inside = (index >= 0) & (index < length)
    seen = torch.zeros(batch, length + 1, dtype=torch.bool, device=input_ids.device)
    return seen.scatter(1, torch.where(inside, index, length), True)[:, :length] & live


def count_prompt_tokens(
    model: Any, input_ids: torch.Tensor, cache: Any, attention_mask: torch.Tensor | None = None
) -> PromptTokens:
    """How many tokens, vision tokens and kept vision tokens each prompt of a call had.

    Args:
        model: patched by :func:`ocvtp.apply`, or as it came, in a wrapper or not.
        input_ids: see :func:`kept_columns`.
        cache: see :func:`kept_columns`.
        attention_mask: see :func:`kept_columns`.

    Raises:
        UnsupportedModelError: no adapter knows the model.
        ValueError: see :func:`kept_columns`.
    """
    target = unwrap(model)
    adapter = adapter_for(target)
    live = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    vision = live.bool() & torch.stack(
        [input_ids == adapter.token_id(kind) for kind in adapter.pixel_keys]
    ).any(0)
    seen = kept_columns(input_ids, cache, attention_mask)
    kept = (vision & seen).sum(1)
    controller = target.__dict__.get(ATTRIBUTE)
    method = controller.settings.inside if controller is not None and controller.enabled else None
    counts = [int(count) for count in kept.tolist()]
    if method is None:
        in_layers = tuple(float(count) for count in counts)
    else:
        depth = Decoder(target).depth
        in_layers = tuple(
            averages(method, depth=depth, tokens=count).entering if count else 0.0 for count in counts
        )
    return PromptTokens(seen.sum(1), vision.sum(1), kept, in_layers)
