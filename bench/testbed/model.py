"""The architecture: LLaVA's, with everything small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.testbed.language import BEGIN, END, IMAGE, PAD, VOCABULARY
from ocvtp.vlm.towers.clip import root

_SLOWEST = 100.0  # the longest wave's length in patches, over 2 pi
_AMPLITUDE = 0.3  # about as large as what the pixels say


@dataclass(frozen=True)
class Size:
    """Of a model.

    Attributes:
        side: pixels of a picture.
        patch: pixels of a patch.
        width: of the vision tower.
        layers: of the tower; the language model reads the last one's output.
        heads: of the tower.
        text_width: of the language model.
        text_layers: of it.
        text_heads: of it.
    """

    side: int = 128
    patch: int = 8
    width: int = 192
    layers: int = 6
    heads: int = 6
    text_width: int = 192
    text_layers: int = 5
    text_heads: int = 6

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


def build(size: Size) -> Any:
    """A ``LlavaForConditionalGeneration`` with fresh weights, from torch's global generator."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    special = {
        "pad_token_id": VOCABULARY[PAD],
        "bos_token_id": VOCABULARY[BEGIN],
        "eos_token_id": VOCABULARY[END],
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            image_size=size.side,
            patch_size=size.patch,
            projection_dim=size.width,
        ),
        text_config=LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=size.text_width,
            intermediate_size=round(size.text_width * 8 / 3 / 32) * 32,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads,
            num_key_value_heads=size.text_heads,
            max_position_embeddings=1024,
            **special,
        ),
        image_token_index=VOCABULARY[IMAGE],
        image_seq_length=size.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    _place(model, size)
    return model


def _place(model: Any, size: Size) -> None:
    """Let position embeddings begin as waves along both sides; as noise, near and far take long to learn."""
    frequencies = _SLOWEST ** -(torch.arange(size.width // 4) / (size.width // 4))
    row, column = torch.meshgrid(torch.arange(size.grid), torch.arange(size.grid), indexing="ij")
    waves = [
        wave(at.flatten()[:, None] * frequencies) for at in (column, row) for wave in (torch.sin, torch.cos)
    ]
    with torch.no_grad():
        root(model.model.vision_tower).embeddings.position_embedding.weight[1:] = _AMPLITUDE * torch.cat(
            waves, 1
        )
