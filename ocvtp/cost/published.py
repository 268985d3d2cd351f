"""Sizes of published vision-language models: enough to count their work, or to time them, without a download.

Numbers are those of each ``config.json`` on the Hub (``repository``); such a model has random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: The tower of LLaVA-1.5 and LLaVA-NeXT: openai/clip-vit-large-patch14-336.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_VICUNA = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 32001}
_VICUNA_7B = {
    **_VICUNA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_VICUNA_13B = {
    **_VICUNA,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_QWEN25 = {"max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "num_key_value_heads": 4}
_QWEN25_3B = {
    **_QWEN25,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_QWEN25_7B = {
    **_QWEN25,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
}
_QWEN25_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

Family = Literal["llava", "llava_next", "qwen2_5_vl"]


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        name: short, as the command line takes it.
        repository: on the Hub, where the numbers are from.
        family: ``config.model_type``.
        text: sizes of the language model.
        vision: sizes of the tower.
        image: height and width in pixels of the picture counted by default, one that is not padded.
    """

    name: str
    repository: str
    family: Family
    text: dict[str, Any]
    vision: dict[str, Any]
    image: tuple[int, int]

    def config(self) -> Any:
        """A transformers configuration."""
        import transformers

        if self.family == "qwen2_5_vl":
            rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
            return transformers.Qwen2_5_VLConfig(
                text_config={**self.text, "rope_parameters": rope},
                vision_config={**self.vision, "out_hidden_size": self.text["hidden_size"]},
                tie_word_embeddings=self.text.get("tie_word_embeddings", False),
            )
        sizes = {
            "vision_config": transformers.CLIPVisionConfig(**self.vision),
            "text_config": transformers.LlamaConfig(**self.text),
            "image_token_index": 32000,
        }
        if self.family == "llava_next":
            return transformers.LlavaNextConfig(**sizes, image_grid_pinpoints=_NEXT_GRIDS)
        return transformers.LlavaConfig(**sizes, image_seq_length=576)


PUBLISHED = {
    model.name: model
    for model in (
        Published("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "llava", _VICUNA_7B, CLIP_L_336, (336, 336)),
        Published("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "llava", _VICUNA_13B, CLIP_L_336, (336, 336)),
        Published(
            "llava-next-7b",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava_next",
            _VICUNA_7B,
            CLIP_L_336,
            (672, 672),
        ),
        Published(
            "qwen2.5-vl-3b",
            "Qwen/Qwen2.5-VL-3B-Instruct",
            "qwen2_5_vl",
            _QWEN25_3B,
            _QWEN25_TOWER,
            (1008, 1008),
        ),
        Published(
            "qwen2.5-vl-7b",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "qwen2_5_vl",
            _QWEN25_7B,
            _QWEN25_TOWER,
            (1008, 1008),
        ),
    )
}
