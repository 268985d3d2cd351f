"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, positions in three dimensions."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from ocvtp import OCPruner
from ocvtp.vlm.towers.qwen import run_qwen_tower
from tests.vlm import tiny_qwen
from tests.vlm.family import Choice, Family, Inputs, Seen, inputs_of
from tests.vlm.tiny_qwen import IMAGE, MERGE, VIDEO, VISION_END, VISION_START, grid, pixels, units

IMAGES = [(1, 8, 12), (1, 6, 6), (1, 4, 10), (1, 6, 8)]
FRAMES = (3, 6, 8)


def picture(*which: int) -> Inputs:
    grids = grid(*(IMAGES[i] for i in which))
    made = [pixels(grid(IMAGES[i]), seed=i) for i in which]
    return {"pixel_values": torch.cat(made), "image_grid_thw": grids}


def image(which: int) -> list[int]:
    return [VISION_START, *[IMAGE] * units(grid(IMAGES[which]))[0], VISION_END]


def with_types(model: Any, row: list[int], **pixels_of_it: Any) -> Inputs:
    ids = torch.tensor([row])
    made: Inputs = {"input_ids": ids, **pixels_of_it}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        made["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return made


def rows(model: Any) -> dict[str, Inputs]:
    count = units(grid(FRAMES))[0]
    video = [VISION_START, *[VIDEO] * count, VISION_END]
    beside: Inputs = {}
    if model.config.model_type.startswith("qwen3_vl"):  # every frame after its timestamp
        one = [VISION_START, *[VIDEO] * (count // FRAMES[0]), VISION_END]
        video = [token for frame in range(FRAMES[0]) for token in [40 + frame, *one]]
    elif model.config.model_type == "qwen2_5_vl":
        beside["second_per_grid_ts"] = torch.tensor([1.5])
    beside |= {"pixel_values_videos": pixels(grid(FRAMES), 8), "video_grid_thw": grid(FRAMES)}
    return {
        "one": with_types(model, [1, 5, *image(0), 7, 8, 9], **picture(0)),
        "two": with_types(model, [1, 11, *image(1), 12, 13, *image(2), 14, 15], **picture(1, 2)),
        "text": with_types(model, [1, 21, 22, 23, 24]),
        "video": with_types(model, [1, 2, *video, 33], **beside),
    }


def seen(model: Any, inputs: Inputs, pruner: OCPruner, options: Inputs) -> dict[str, list[Seen]]:
    """The tower's taps and scores are held against transformers in ``test_vlm_qwen_tower``."""
    out: dict[str, list[Seen]] = {}
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if key not in inputs:
            continue
        grids = inputs[f"{kind}_grid_thw"]
        visual, get = model.model.visual, getattr(model.model, f"get_{kind}_features")
        mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
        run_it = functools.partial(get, inputs[key], grids, return_dict=True)
        features, read = inputs_of(mergers, run_it)
        read = [patches.unflatten(0, (-1, MERGE**2)).flatten(1) for patches in read]
        # Qwen2.5-VL goes through the units window by window: where each of them is, its row says.
        rows = torch.cat(list(features.pooler_output))
        order = torch.cdist(rows, _merged(visual.merger, read[0])).argmin(1)
        read = [units[order] for units in read]

        def project(*means: torch.Tensor, mergers: Any = mergers) -> list[torch.Tensor]:
            return [_merged(merger, units) for merger, units in zip(mergers, means, strict=True)]

        run = run_qwen_tower(model.model.visual, inputs[key], grids, {pruner.config.layer})
        early, scores = run.features(pruner.config.layer), run.received_attention("torch")
        start = 0
        for i, (frames, height, width) in enumerate(grids.tolist()):
            count = height * width // MERGE**2
            parts = 1 if options.get("frames") == "all" else frames
            each = frames * count // parts
            slots = torch.arange(frames * count).view(parts, each)
            choices = [
                Choice(
                    early[start + slot],
                    scores[start + slot],
                    slot,
                    [units[start + slot] for units in read],
                    project,
                )
                for slot in slots
            ]
            deep = [layer[i] for layer in _deep(features, grids)]
            out.setdefault(kind, []).append(Seen(choices, features.pooler_output[i], deep))
            start += frames * count
    return out


def _merged(merger: Any, units: torch.Tensor) -> torch.Tensor:
    """What a merger makes of units ``[n, patches * C]``."""
    made: torch.Tensor = merger(units.unflatten(1, (MERGE**2, -1)).flatten(0, 1))
    return made


def _deep(features: Any, grids: torch.Tensor) -> list[Any]:
    """DeepStack features by layer and image; releases return them whole or split."""
    layers = getattr(features, "deepstack_features", None) or []
    return [layer if not isinstance(layer, torch.Tensor) else layer.split(units(grids)) for layer in layers]


def _second(model: Any) -> Inputs:
    return with_types(model, [43, *image(3), 44, 45], **picture(3))


def _family(name: str, **more: Any) -> Family:
    make = tiny_qwen.FAMILIES[name]
    return Family(
        name,
        make,
        tiny_qwen.WIDTH,
        lambda: rows(make()),
        seen,
        lambda: _second(make()),
        unit=MERGE,
        pixels={
            "image": ("pixel_values", "image_grid_thw"),
            "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
        },
        options=[{"frames": "all"}],
        positions=("original",),
        mrope=True,
        **more,
    )


FAMILIES = [
    _family("qwen2_vl", since="5.10"),
    _family("qwen2_5_vl", since="5.10"),
    _family("qwen3_vl", since="5.18"),
    _family("qwen3_vl_moe", since="5.18"),
]
