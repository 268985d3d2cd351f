"""Tiny random LLaVA models and prompts; no hub, no tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from ocvtp import OCPruner, PrunerConfig

IMAGE, PAD, VOCAB = 120, 0, 128
TOKENS = 16  # patches of a 56 x 56 image
LAYERS = 6
WIDTH = 64
KEEP = 5
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
#: Dropped tokens are thrown away, as published: what was built by hand of kept tokens alone.
PLAIN: dict[str, Any] = {"merge": "off", "weigh": False}
#: They are averaged into kept ones; and the language model knows how many a kept one stands for.
MERGED: dict[str, Any] = {"merge": "projected", "weigh": False}
WEIGHED: dict[str, Any] = {"merge": "projected", "weigh": True}

_RUN = [IMAGE] * TOKENS
ONE = [1, 5, 6, *_RUN, 7, 8, 9]
TWO = [1, 11, *_RUN, 12, 13, *_RUN, 14, 15, 16, 17]
NONE = [1, 21, 22, 23, 24]


def text_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**sizes, **changes})


def vision_config(tower: str = "clip") -> Any:
    kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    return kind(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )


def sharpen(model: torch.nn.Module) -> Any:
    """Random logits far enough apart for token-by-token comparisons to mean something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
        if hasattr(model, "lm_head"):
            model.lm_head.weight[IMAGE] = 0  # an answer with placeholders in it can't be asked about
    return model.eval()


def llava(
    attention: str = "sdpa", *, tower: str = "clip", layer: Any = -2, strategy: str = "default", seed: int = 0
) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision_config(tower),
        text_config=text_config(),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=TOKENS,
        attn_implementation=attention,
    )
    return sharpen(LlavaForConditionalGeneration(config))


def pruner(layer: int = 2, in_dim: int = WIDTH, seed: int = 3) -> OCPruner:
    torch.manual_seed(seed)
    config = PrunerConfig(in_dim=in_dim, hidden_dim=96, slot_dim=32, ffn_dim=64, layer=layer)
    made = OCPruner(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.copy_(1.5 * torch.randn(parameter.shape) * parameter.shape[1] ** -0.5)
    return made


def pixels(images: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(images, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of a padded batch."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        ids.append([PAD] * gap + row if side == "left" else row + [PAD] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def prompt(row: list[int], images: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Inputs of one unpadded prompt."""
    inputs = {"input_ids": torch.tensor([row])}
    if images is not None:
        inputs["pixel_values"] = images
    return inputs


def mixed() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A left-padded batch (one image, two images, none) and its rows one by one."""
    images = pixels(3)
    batch = {**pad([ONE, TWO, NONE]), "pixel_values": images}
    return batch, [prompt(ONE, images[:1]), prompt(TWO, images[1:]), prompt(NONE)]
