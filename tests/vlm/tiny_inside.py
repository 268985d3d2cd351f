"""Tiny vision-language models deep enough to drop tokens inside, whose attention is not flat."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from ocvtp.methods.in_llm import Dart, FastV, Method, PyramidDrop, SparseVLM
from tests.vlm import tiny_llava, tiny_qwen

DEPTH = 6
IMAGE = tiny_llava.IMAGE
TOKENS = tiny_llava.TOKENS  # of an image
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}

#: Settings of every method that keep fewer than an image has.
METHODS: dict[str, Method] = {
    "fastv": FastV(2, 6),
    "sparsevlm": SparseVLM((1, 2, 4), (10, 7, 4), cluster_div=2),
    "sparsevlm2": SparseVLM((1, 2, 4), (10, 7, 4), 2, heads=2),
    "pyramiddrop": PyramidDrop((2, 3, 5), (0.6, 0.3, 0.1)),
    "dart": Dart(2, 7, (2, 2)),
}
#: The same that keep everything, of those that can.
WHOLE: dict[str, Method] = {
    "fastv": FastV(2, 1.0),
    "pyramiddrop": PyramidDrop((2, 3, 5), (1.0, 1.0, 1.0)),
    "dart": Dart(2, 1.0, (2, 2)),
}


def _sharp(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                peaked = 1.5 if "q_proj" in name or "k_proj" in name else 0.8
                scale = 1.0 if "embed_tokens" in name else peaked * parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.lm_head.weight[IMAGE : IMAGE + 4] = 0  # an answer with placeholders in it can't be asked about
    return model.float().eval()


def llava(attention: str = "sdpa") -> Any:
    config = LlavaConfig(
        vision_config=tiny_llava.vision_config(),
        text_config=tiny_llava.text_config(num_hidden_layers=DEPTH),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        attn_implementation=attention,
    )
    return _sharp(LlavaForConditionalGeneration, config)


def llava_next(attention: str = "sdpa") -> Any:
    config = LlavaNextConfig(
        vision_config=tiny_llava.vision_config(),
        text_config=tiny_llava.text_config(num_hidden_layers=DEPTH),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[56, 112], [112, 56]],
        attn_implementation=attention,
    )
    return _sharp(LlavaNextForConditionalGeneration, config)


def qwen2_5_vl(attention: str = "sdpa") -> Any:
    config = Qwen2_5_VLConfig(
        vision_config={
            **tiny_qwen._VISION,
            "hidden_size": tiny_qwen.WIDTH,
            "intermediate_size": 128,
            "window_size": tiny_qwen.WINDOW * tiny_qwen.MERGE * tiny_qwen.PATCH,
            "out_hidden_size": tiny_qwen.HIDDEN,
            "fullatt_block_indexes": tiny_qwen.FULL,
            "tokens_per_second": 2,
        },
        text_config={**tiny_qwen._text(), "num_hidden_layers": DEPTH},
        attn_implementation=attention,
        **tiny_qwen._IDS,
    )
    return _sharp(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(attention: str = "sdpa") -> Any:
    config = Qwen3VLConfig(
        vision_config=tiny_qwen._QWEN3_VISION,
        text_config={**tiny_qwen._text(mrope_interleaved=True), "num_hidden_layers": DEPTH},
        attn_implementation=attention,
        **tiny_qwen._IDS,
    )
    return _sharp(Qwen3VLForConditionalGeneration, config)


MODELS: dict[str, Callable[..., Any]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}


def row(family: str, before: int, after: int, images: int = 1, seed: int = 0) -> dict[str, Any]:
    """Ids and pixels of one prompt: words, images with words between them, words."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(2, 110, (count,), generator=generator).tolist()

    qwen = family.startswith("qwen")
    start, end = ([tiny_qwen.VISION_START], [tiny_qwen.VISION_END]) if qwen else ([], [])
    count = _next_tokens() if family == "llava_next" else TOKENS
    ids = words(before)
    for image in range(images):
        ids += start + [IMAGE] * count + end + (words(2) if image + 1 < images else [])
    ids += words(after)
    made: dict[str, Any] = {"ids": ids}
    if images and qwen:
        made["image_grid_thw"] = torch.tensor([[1, 8, 8]] * images)
        made["pixel_values"] = torch.randn(images * 64, 3 * 2 * tiny_qwen.PATCH**2, generator=generator)
    elif images and family == "llava_next":
        made["pixel_values"] = torch.randn(images, 3, 3, 56, 56, generator=generator)
        made["image_sizes"] = torch.tensor([[56, 112]] * images)
    elif images:
        made["pixel_values"] = torch.randn(images, 3, 56, 56, generator=generator)
    return made


def _next_tokens() -> int:
    return TOKENS + 4 * 8 + 4  # the small picture, two tiles side by side, and a newline behind every line


def batch(rows: list[dict[str, Any]], side: str = "left") -> dict[str, torch.Tensor]:
    """Padded inputs of several prompts."""
    made: dict[str, torch.Tensor] = tiny_llava.pad([one["ids"] for one in rows], side)
    for name in ("pixel_values", "image_grid_thw", "image_sizes"):
        parts = [one[name] for one in rows if name in one]
        if parts:
            made[name] = torch.cat(parts)
    if any("image_grid_thw" in one for one in rows) and _takes_types():
        made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).long()
    return made


def _takes_types() -> bool:
    import inspect

    return "mm_token_type_ids" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters


def new(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What was generated."""
    return output[:, inputs["input_ids"].shape[1] :]


def four(family: str) -> list[dict[str, Any]]:
    """Prompts of one, one, no and two images."""
    return [
        row(family, 3, 9, seed=1),
        row(family, 7, 4, seed=2),
        row(family, 12, 6, images=0, seed=3),
        row(family, 2, 5, images=2, seed=4),
    ]


@torch.no_grad()
def forced(model: Any, inputs: dict[str, torch.Tensor], steps: torch.Tensor) -> torch.Tensor:
    """``[B, 1 + steps, vocabulary]``: logits behind the prompt, and behind each of some given tokens."""
    inner, mask = model.model, inputs["attention_mask"]
    mrope = hasattr(inner, "rope_deltas")
    if mrope:
        inner.rope_deltas = None
    more = {} if mrope else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    out = model(**inputs, **more, use_cache=True)
    logits, cache = [out.logits[:, -1]], out.past_key_values
    for token in steps.unbind(1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        if mrope:
            moved = inner.rope_deltas if "pixel_values" in inputs else 0
            positions = (positions + moved)[None].expand(3, -1, -1)
        out = model(
            input_ids=token[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            position_ids=positions,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def ours_on(model: Any) -> list[Any]:
    """Our hooks on a model; transformers has some of its own."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    functions = (hook.func if isinstance(hook, functools.partial) else hook for hook in hooks)
    return [one for one in functions if one.__module__.startswith("ocvtp")]
