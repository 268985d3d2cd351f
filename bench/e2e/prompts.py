"""Prompts of made-up words around random pictures, of any family, without a processor."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.families.arguments import picture_arguments
from ocvtp.vlm.options import Options
from ocvtp.vlm.resolving import resolve

Inputs = dict[str, Any]


def prompt(
    model: Any,
    *,
    image: tuple[int, int],
    text_tokens: int,
    batch: int = 1,
    images: int = 1,
    frames: int = 0,
    seed: int = 0,
) -> Inputs:
    """Inputs as the model's processor would make them, on its device; prompts of a batch have equal lengths.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT or a Qwen-VL, unpatched or patched.
        image: height and width of each picture in pixels.
        text_tokens: of each prompt: words, half of them before the pictures, and what marks pictures.
        batch: prompts.
        images: of each prompt.
        frames: instead of images, of one video in each prompt (Qwen-VL).
        seed: of words and pixels.

    Raises:
        ValueError: no room for a word.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[batch, S]``, pixels, and what else the family wants of them.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter, device = adapter_for(model), next(model.parameters()).device
    modality = "video" if frames else "image"
    dtype = next(model.parameters()).dtype

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    count = batch * (1 if frames else images)
    made = picture_arguments(model.config, image, count, noise, frames)
    pictures = {name: torch.as_tensor(value).to(device) for name, value in made.items()}
    settings, _ = resolve(adapter, Options("grid", 1.0))
    totals = list(adapter.vision(modality, pictures, settings).totals)
    special, marks = adapter.token_id(modality), _marks(model)
    per_prompt = len(totals) // batch
    words = text_tokens - per_prompt * len(marks)
    if words < 1:
        raise ValueError(f"{per_prompt} pictures need more than {text_tokens} text tokens")
    limit = min(special, model.config.get_text_config().vocab_size - 1, *marks)
    rows = []
    for row in range(batch):
        text = torch.randint(3, limit, (words,), generator=generator)
        own = totals[row * per_prompt : (row + 1) * per_prompt]
        placed = [torch.tensor([*marks[:1], *[special] * total, *marks[1:]]) for total in own]
        rows.append(torch.cat([text[: words // 2], *placed, text[words // 2 :]]))
    ids = torch.stack(rows).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    if adapter.mrope:
        inputs["mm_token_type_ids"] = (ids == special).int() * (2 if frames else 1)
    return inputs


def _marks(model: Any) -> list[int]:
    """What Qwen's processor puts before and after each picture; of others, none."""
    names = ("vision_start_token_id", "vision_end_token_id")
    return [mark for name in names if (mark := getattr(model.config, name, None)) is not None]
