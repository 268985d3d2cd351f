"""What a processor makes of pictures, as far as sizes go: to count or time a model without any."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ocvtp.vlm.layouts.packing import packing


def picture_arguments(
    config: Any, size: tuple[int, int], count: int, make: Callable[..., torch.Tensor], frames: int = 0
) -> dict[str, Any]:
    """Arguments of a call with pictures of one size.

    Args:
        config: of a LLaVA-1.5, LLaVA-NeXT, Qwen2-VL or Qwen2.5-VL.
        size: height and width of each picture in pixels.
        count: of pictures, or of videos.
        make: makes a tensor of the sizes it is called with.
        frames: of each video (Qwen-VL); 0 for pictures.

    Returns:
        Pixels, and lists of their sizes or grids.
    """
    (height, width), vision = size, config.vision_config
    if config.model_type == "llava":
        return {"pixel_values": make(count, 3, height, width)}
    if config.model_type == "llava_next":
        grids = tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints)
        side = vision.image_size
        tiles = packing(height, width, grids, side, side // vision.patch_size).tiles
        return {"pixel_values": make(count, tiles, 3, side, side), "image_sizes": [[height, width]] * count}
    thick, patch = vision.temporal_patch_size, vision.patch_size
    grid = [max(frames, thick) // thick, height // patch, width // patch]
    pixels = make(count * math.prod(grid), 3 * thick * patch**2)
    if frames:
        return {"pixel_values_videos": pixels, "video_grid_thw": [grid] * count}
    return {"pixel_values": pixels, "image_grid_thw": [grid] * count}
