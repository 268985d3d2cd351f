"""Models that are scaled: small ones for a CPU, published sizes for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ocvtp.cost.published import PUBLISHED

_SMALL_TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
_NO_SPECIALS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_SMALL_CLIP = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "patch_size": 14,
}
_SMALL_QWEN = {
    **PUBLISHED["qwen2.5-vl-7b"].vision,
    "depth": 8,
    "hidden_size": 320,
    "intermediate_size": 1024,
    "num_heads": 4,
    "fullatt_block_indexes": [3, 7],
    "out_hidden_size": 512,
}


def small_llava(side: int = 336, layers: int = 8) -> Any:
    """LLaVA-1.5's shape in small: pictures of ``side`` pixels, a language model of ``layers``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_SMALL_CLIP, image_size=side),
        text_config=LlamaConfig(**{**_SMALL_TEXT, "num_hidden_layers": layers, **_NO_SPECIALS}),
        image_token_index=_SMALL_TEXT["vocab_size"] - 1,
        image_seq_length=(side // 14) ** 2,
    )


def small_qwen() -> Any:
    """Qwen2.5-VL's shape in small: pictures of any size, videos."""
    from transformers import Qwen2_5_VLConfig

    last = _SMALL_TEXT["vocab_size"] - 1
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    return Qwen2_5_VLConfig(
        text_config={**_SMALL_TEXT, "num_key_value_heads": 4, "rope_parameters": rope, **_NO_SPECIALS},
        vision_config=_SMALL_QWEN,
        image_token_id=last,
        video_token_id=last - 1,
        vision_start_token_id=last - 2,
        vision_end_token_id=last - 3,
    )


def _published_llava(side: int = 336, layers: int = 32) -> Any:
    config = PUBLISHED["llava-1.5-7b"].config()
    config.vision_config.image_size = side
    config.image_seq_length = (side // config.vision_config.patch_size) ** 2
    config.text_config.num_hidden_layers = layers
    config.text_config.max_position_embeddings = 32768
    return config


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device.

    Attributes:
        name: for the record.
        llava: configuration of a LLaVA for pictures of ``side`` pixels.
        qwen: configuration of a Qwen-VL.
        tokens: of an image, for the pruner.
        kept: tokens, for the pruner, of :attr:`wide` tokens.
        wide: tokens of the image of which :attr:`kept` are kept.
        batches: images, for the pruner.
        sides: height and width of pictures in pixels, for the Qwen-VL.
        images: of one prompt, for the LLaVA.
        frames: of a video, for the Qwen-VL.
        seconds: for each point.
        budgets: tokens kept of 576, for the LLaVA.
    """

    name: str
    llava: Any
    qwen: Any
    tokens: Sequence[int]
    kept: Sequence[int]
    wide: int
    batches: Sequence[int]
    sides: Sequence[int]
    images: Sequence[int]
    frames: Sequence[int]
    seconds: float
    budgets: Sequence[int] = (16, 32, 64, 128, 192, 288, 432)


_TOKENS = (144, 256, 576, 1024, 2304, 4096, 8192, 16384)
CPU = Scale(
    "small",
    small_llava,
    small_qwen,
    _TOKENS,
    (16, 32, 64, 128, 256, 512),
    1024,
    (1, 2, 4, 8, 16),
    (168, 336, 504, 672, 1008, 1344),
    (1, 2, 4, 8),
    (2, 4, 8, 16, 32),
    3.0,
)
GPU = Scale(
    "7b",
    _published_llava,
    PUBLISHED["qwen2.5-vl-7b"].config,
    _TOKENS,
    (16, 32, 64, 128, 256, 512, 1024),
    2880,
    (1, 2, 4, 8, 16, 32, 64),
    (336, 672, 1008, 1344, 2016, 2688, 3584),
    (1, 2, 4, 8, 16),
    (2, 4, 8, 16, 32, 64),
    1.0,
)
