"""LLaVA-NeXT and LLaVA-OneVision: images of different numbers of tiles."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from ocvtp import OCPruner
from tests.vlm.family import Choice, Family, Inputs, Seen
from tests.vlm.tiny_llava import IMAGE, WIDTH, sharpen, text_config, vision_config

VIDEO = 121
SIDE = 56  # of a tile
GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SIZES = [[60, 100], [110, 50], [90, 100], [40, 150]]  # of the images


def llava_next(attention: str = "sdpa") -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_index=IMAGE,
        image_grid_pinpoints=GRIDS,
        attn_implementation=attention,
    )
    return sharpen(LlavaNextForConditionalGeneration(config))


def llava_onevision(attention: str = "sdpa") -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=vision_config("siglip"),
        text_config=text_config(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        attn_implementation=attention,
    )
    made = sharpen(LlavaOnevisionForConditionalGeneration(config))
    with torch.no_grad():
        made.lm_head.weight[VIDEO] = 0
    return made


def tiles(size: list[int]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(size, GRIDS, SIDE)


def pictures(which: list[int]) -> Inputs:
    counts = [tiles(SIZES[i]) for i in which]
    made = torch.zeros(len(which), max(counts), 3, SIDE, SIDE)
    for row, (i, count) in enumerate(zip(which, counts, strict=True)):
        made[row, :count] = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(i))
    return {"pixel_values": made, "image_sizes": torch.tensor([SIZES[i] for i in which])}


def placeholders(model: Any, which: list[int]) -> list[int]:
    """Lengths of packed images, from the model's packer."""
    packed = _pack(model, which, torch.zeros(1), lambda count: torch.zeros(count, 16, 1))
    return [len(one) for one in packed]


def _pack(model: Any, sizes: Any, newline: torch.Tensor, make: Any) -> list[torch.Tensor]:
    """The model's own packer on something per token, image by image."""
    out = []
    for size in [SIZES[i] for i in sizes] if isinstance(sizes[0], int) else sizes.tolist():
        passed: Inputs = {"image_newline": newline}
        if model.config.model_type == "llava_next":
            passed["vision_feature_select_strategy"] = "full"
        else:
            passed["vision_aspect_ratio"] = model.config.vision_aspect_ratio
        packed, _ = model.model.pack_image_features([make(tiles(size))], torch.tensor([size]), **passed)
        out.append(packed[0])
    return out


def ids(model: Any, *parts: int | list[int]) -> torch.Tensor:
    """Token ids; a list of one number is that image."""
    row: list[int] = []
    for part in parts:
        row += [IMAGE] * placeholders(model, part)[0] if isinstance(part, list) else [part]
    return torch.tensor([row])


def make_rows(model: Any) -> dict[str, Inputs]:
    made = {
        "one": {"input_ids": ids(model, 1, 5, 6, [0], 7, 8, 9), **pictures([0])},
        "two": {"input_ids": ids(model, 1, 11, [1], 12, 13, [2], 14, 15), **pictures([1, 2])},
        "text": {"input_ids": torch.tensor([[1, 21, 22, 23, 24]])},
    }
    if model.config.model_type == "llava_onevision":
        frames = torch.randn(1, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
        row = torch.tensor([[1, 2, *[VIDEO] * (3 * 4 + 1), 33]])
        made["video"] = {"input_ids": row, "pixel_values_videos": frames}
    return made


def tower(model: Any, images: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Early features, received attention and consumed output of patches."""
    first = int(model.config.model_type == "llava_next")
    make = llava_next if first else llava_onevision
    eager = make("eager").model.vision_tower
    depth = -2 if first else -1
    attention = eager(images, output_attentions=True).attentions[depth]
    captured: list[torch.Tensor] = []
    encoder = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).encoder
    hooks = [
        encoder.layers[i].register_forward_hook(lambda _m, _a, out: captured.append(out))
        for i in (layer, len(encoder.layers) + depth)
    ]
    model.model.vision_tower(images)
    for hook in hooks:
        hook.remove()
    early, late = ((x[0] if isinstance(x, tuple) else x)[:, first:] for x in captured)
    return early, attention.mean((1, 2))[:, first:], late


def seen(model: Any, inputs: Inputs, pruner: OCPruner, options: Inputs) -> dict[str, list[Seen]]:
    out: dict[str, list[Seen]] = {}
    if "pixel_values" in inputs:
        out["image"] = [
            _image(model, picture, size, pruner, options)
            for picture, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True)
        ]
    if "pixel_values_videos" in inputs:
        out["video"] = [_video(model, video, pruner, options) for video in inputs["pixel_values_videos"]]
    return out


def _image(model: Any, picture: torch.Tensor, size: torch.Tensor, pruner: OCPruner, options: Inputs) -> Seen:
    count = tiles(size.tolist())
    early, scores, late = tower(model, picture[:count], pruner.config.layer)
    projected = model.model.multi_modal_projector(late)
    newline = model.model.image_newline
    rows = _pack(model, size[None], newline, lambda _: projected)[0]
    mark = torch.full((1,), torch.nan)
    packed_scores = _pack(model, size[None], mark, lambda _: scores[..., None])[0][:, 0]
    real = ~packed_scores.isnan()
    blank = torch.zeros(early.shape[-1])
    packed = _pack(model, size[None], blank, lambda _: early)[0]
    slots, newlines = real.nonzero()[:, 0], (~real).nonzero()[:, 0]

    def project(means: torch.Tensor) -> list[torch.Tensor]:
        return [model.model.multi_modal_projector(means)]

    if options.get("layout") == "official":
        nowhere = torch.zeros(scores.numel(), dtype=torch.long)
        flat = Choice(early.flatten(0, 1), scores.flatten(), nowhere, [late.flatten(0, 1)], project)
        every = projected.flatten(0, 1)
        return Seen([flat], rows, compact_rows=lambda kept: torch.cat([every[kept], newline[None]]))

    def always(kept: torch.Tensor) -> torch.Tensor:
        policy = options.get("newlines", "last")
        if policy == "last":
            return newlines[-1:]
        if policy == "all":
            return newlines
        base = len(early[0])  # the whole picture has no newlines
        return torch.stack([n for n in newlines if any(_row_of(k, newlines, base) == n for k in kept)])

    read = _pack(model, size[None], blank, lambda _: late)[0][slots]
    choice = Choice(packed[slots], packed_scores[slots], slots, [read], project)
    return Seen([choice], rows, always=always)


def _row_of(slot: torch.Tensor, newlines: torch.Tensor, base: int) -> int:
    return -1 if slot < base else int(newlines[newlines > slot][0])


def _video(model: Any, video: torch.Tensor, pruner: OCPruner, options: Inputs) -> Seen:
    early, scores, late = tower(model, video, pruner.config.layer)
    pool = model.model.apply_pooling
    rows = pool(model.model.multi_modal_projector(late)).flatten(0, 1)
    rows = torch.cat([rows, model.model.image_newline[None]])
    small, received = pool(early), pool(scores[..., None])[..., 0]
    slots = torch.arange(len(rows) - 1).unflatten(0, (len(small), -1))
    if options.get("frames") == "all":
        small, received, slots = (x.flatten(0, 1)[None] for x in (small, received, slots))
    choices = [Choice(*parts) for parts in zip(small, received, slots, strict=True)]
    return Seen(choices, rows, always=lambda _: torch.tensor([len(rows) - 1]))


def _second(make: Any) -> Inputs:
    return {"input_ids": ids(make(), 43, [3], 44, 45), **pictures([3])}


def _family(make: Any, **more: Any) -> Family:
    return Family(
        make.__name__,
        make,
        WIDTH,
        lambda: make_rows(make()),
        seen,
        lambda: _second(make),
        pixels={"image": ("pixel_values", "image_sizes"), "video": ("pixel_values_videos",)},
        **more,
    )


FAMILIES = [
    _family(
        llava_next,
        options=[
            {"newlines": "rows"},
            {"newlines": "all"},
            {"layout": "official", "positions": "compact"},
            {"tower": "kept_rows"},
        ],
    ),
    _family(llava_onevision, keep=3, options=[{"newlines": "rows"}, {"newlines": "all"}, {"frames": "all"}]),
]
