"""Pictures of one size, patches merged into tokens: InternVL, Idefics3, SmolVLM, Gemma 3, PaliGemma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from ocvtp import OCPruner
from tests.vlm.family import Choice, Family, Inputs, Seen, inputs_of
from tests.vlm.tiny_llava import IMAGE, LAYERS, PAD, VOCAB, WIDTH, sharpen, text_config

SIDE = 8  # patches
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIDE * 14,
    "patch_size": 14,
}


def _built(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return sharpen(kind(config))


def internvl(attention: str = "sdpa") -> InternVLForConditionalGeneration:
    square = {"image_size": [SIDE * 14] * 2, "patch_size": [14, 14]}
    vision = InternVLVisionConfig(**{**VISION, **square}, use_qk_norm=True, layer_scale_init_value=0.9)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_id=IMAGE,
        image_seq_length=16,
        attn_implementation=attention,
    )
    return _built(InternVLForConditionalGeneration, config)


def idefics3(attention: str = "sdpa") -> Idefics3ForConditionalGeneration:
    config = Idefics3Config(
        vision_config=dict(VISION),
        text_config=text_config(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        attn_implementation=attention,
    )
    return _built(Idefics3ForConditionalGeneration, config)


def smolvlm(attention: str = "sdpa") -> SmolVLMForConditionalGeneration:
    config = SmolVLMConfig(
        vision_config=dict(VISION),
        text_config=text_config(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        attn_implementation=attention,
    )
    return _built(SmolVLMForConditionalGeneration, config)


def gemma3(attention: str = "sdpa") -> Gemma3ForConditionalGeneration:
    text = Gemma3TextConfig(**TEXT, query_pre_attn_scalar=12, sliding_window=64)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=122,
        eoi_token_index=123,
        attn_implementation=attention,
    )
    made = _built(Gemma3ForConditionalGeneration, config)
    with torch.no_grad():  # zero unless loaded
        made.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.2)
    return made


def paligemma(attention: str = "sdpa") -> PaliGemmaForConditionalGeneration:
    vision = SiglipVisionConfig(**{**VISION, "image_size": 56}, projection_dim=48, vision_use_head=False)
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=48,
        hidden_size=48,
        pad_token_id=PAD,
        attn_implementation=attention,
    )
    return _built(PaliGemmaForConditionalGeneration, config)


def _pictures(make: Callable[..., Any], which: list[int]) -> torch.Tensor:
    side = 56 if make is paligemma else SIDE * 14
    made = [torch.randn(3, side, side, generator=torch.Generator().manual_seed(i)) for i in which]
    stacked = torch.stack(made)
    return stacked[None] if make in (idefics3, smolvlm) else stacked


def _inputs(make: Callable[..., Any], row: list[int], which: list[int]) -> Inputs:
    ids = torch.tensor([row])
    inputs: Inputs = {"input_ids": ids}
    if which:
        inputs["pixel_values"] = _pictures(make, which)
    if make is gemma3:
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if make is paligemma:  # what the processor marks as the answer
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def _run(make: Callable[..., Any], first: int, last: int) -> list[int]:
    run = [IMAGE] * 16
    return [122, *run, 123] if make is gemma3 else [first, *run, last]


def rows(make: Callable[..., Any]) -> dict[str, Inputs]:
    one, two = _run(make, 5, 6), [*_run(make, 11, 12), 13, *_run(make, 14, 15)]
    return {
        "one": _inputs(make, [1, *one, 7, 8, 9], [0]),
        "two": _inputs(make, [1, *two, 16, 17, 18], [1, 2]),
        "text": _inputs(make, [1, 21, 22, 23, 24], []),
    }


def seen(model: Any, inputs: Inputs, pruner: OCPruner, options: Inputs) -> dict[str, list[Seen]]:
    if "pixel_values" not in inputs:
        return {}
    pixels = inputs["pixel_values"]
    pixels = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    make = {"internvl": internvl, "idefics3": idefics3, "smolvlm": smolvlm, "gemma3": gemma3}
    eager = make.get(model.config.model_type, paligemma)("eager")
    kind = model.config.model_type
    tower, plain = (
        m.model.vision_model if kind in ("idefics3", "smolvlm") else m.model.vision_tower
        for m in (eager, model)
    )
    first = int(kind == "internvl")
    attention = tower(pixels, output_attentions=True).attentions[-1].mean((1, 2))[:, first:]
    early = plain(pixels, output_hidden_states=True).hidden_states[pruner.config.layer + 1][:, first:]
    connector = getattr(model.model, "connector", None)
    projector = model.model.multi_modal_projector if connector is None else connector.modality_projection
    made, (read,) = inputs_of(
        [projector], lambda: model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    )
    features = made.pooler_output
    features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    features = features.reshape(len(pixels), -1, features.shape[-1])
    side = int(early.shape[1] ** 0.5)
    unit = int((early.shape[1] / features.shape[1]) ** 0.5)
    blocks = (side // unit, unit, side // unit, unit)
    merged = early.unflatten(1, blocks).mean((2, 4)).flatten(1, 2)
    received = attention.unflatten(1, blocks).sum((2, 4)).flatten(1)
    every = torch.arange(features.shape[1])

    def project(means: torch.Tensor) -> list[torch.Tensor]:
        return [projector(means[None])[0]]

    found: dict[str, list[Seen]] = {"image": []}
    for i in range(len(pixels)):
        sources = [] if kind == "gemma3" else [read[i]]  # Gemma 3 averages patches before it projects them
        choice = Choice(merged[i], received[i], every, sources, project)
        found["image"].append(Seen([choice], features[i]))
    return found


def _family(make: Callable[..., Any], **more: Any) -> Family:
    return Family(
        make.__name__,
        make,
        WIDTH,
        lambda: rows(make),
        seen,
        lambda: _inputs(make, [43, *_run(make, 30, 31), 44, 45], [3]),
        **{"unit": 2, **more},
    )


FAMILIES = [
    _family(internvl),
    _family(idefics3),
    _family(smolvlm),
    _family(gemma3, since="5.18", image_turns="5.23"),
    _family(paligemma, unit=1, since="5.18", turns=False),
]
