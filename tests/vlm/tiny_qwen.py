"""Tiny random Qwen-VL models, grids and pixels; no hub, no processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.vlm.tiny_llava import PAD, VOCAB, sharpen

__all__ = ["IMAGE", "PAD", "VIDEO", "VISION_END", "VISION_START", "VOCAB"]

IMAGE, VIDEO, VISION_START, VISION_END = 120, 121, 122, 123
MERGE = 2  # patches along the side of a unit
PATCH = 14
WIDTH = 64  # of the towers
HIDDEN = 48  # of the language models
DEPTH = 6  # blocks of the towers
FULL = [2, 5]  # Qwen2.5-VL's blocks with full attention
WINDOW = 2  # units along the side of its windows
STACKED = [1, 3]  # Qwen3-VL's DeepStack blocks

_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "depth": DEPTH,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def _text(**rope: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], **rope}
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 2, 2],
            **rope,
        },
    }


def _built(kind: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    made = sharpen(kind(config))
    with torch.no_grad():
        made.lm_head.weight[[VIDEO, VISION_START, VISION_END]] = 0  # see sharpen about placeholders
    return made


def qwen2_vl(attention: str = "sdpa", *, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    vision = {**_VISION, "embed_dim": WIDTH, "hidden_size": HIDDEN, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=_text(), attn_implementation=attention, **_IDS)
    return _built(Qwen2VLForConditionalGeneration, config, seed)


def qwen2_5_vl(
    attention: str = "sdpa", *, seed: int = 0, **vision_changes: Any
) -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        **_VISION,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "window_size": WINDOW * MERGE * PATCH,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": FULL,
        "tokens_per_second": 2,
        **vision_changes,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=_text(), attn_implementation=attention, **_IDS
    )
    return _built(Qwen2_5_VLForConditionalGeneration, config, seed)


_QWEN3_VISION: dict[str, Any] = {
    **_VISION,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": STACKED,
}


def qwen3_vl_moe(attention: str = "sdpa", *, seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    text = {
        **_text(mrope_interleaved=True),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    }
    config = Qwen3VLMoeConfig(
        vision_config=_QWEN3_VISION, text_config=text, attn_implementation=attention, **_IDS
    )
    return _built(Qwen3VLMoeForConditionalGeneration, config, seed)


def qwen3_vl(attention: str = "sdpa", *, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    config = Qwen3VLConfig(
        vision_config=_QWEN3_VISION,
        text_config=_text(mrope_interleaved=True),
        attn_implementation=attention,
        **_IDS,
    )
    return _built(Qwen3VLForConditionalGeneration, config, seed)


#: Family -> builder of its model.
FAMILIES = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}


def grid(*sizes: Sequence[int]) -> torch.Tensor:
    """``grid_thw``: frames (after temporal merging), rows and columns of patches."""
    return torch.tensor([list(size) for size in sizes])


def pixels(grid_thw: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """``pixel_values`` (or ``pixel_values_videos``) of these grids, ``[patches, 3 * 2 * PATCH ** 2]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid_thw.prod(-1).sum()), 3 * 2 * PATCH**2, generator=generator)


def units(grid_thw: torch.Tensor) -> list[int]:
    """Merged units, that is placeholders, of each image or video."""
    return (grid_thw.prod(-1) // MERGE**2).tolist()
