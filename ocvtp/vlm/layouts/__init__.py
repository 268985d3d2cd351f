"""The families' images, from their configurations alone: shared by the patch and by servers."""

from __future__ import annotations

import importlib
from typing import Any

#: ``config.model_type`` -> module of this folder and the layout in it.
LAYOUTS: dict[str, tuple[str, str]] = {
    "gemma3": ("squares", "Gemma3Layout"),
    "idefics3": ("squares", "Idefics3Layout"),
    "internvl": ("squares", "InternVLLayout"),
    "llava": ("pictures", "PictureLayout"),
    "llava_next": ("tiles", "TileLayout"),
    "llava_onevision": ("tiles", "OnevisionLayout"),
    "paligemma": ("squares", "SquareLayout"),
    "qwen2_vl": ("units", "UnitLayout"),
    "qwen2_5_vl": ("units", "UnitLayout"),
    "qwen3_vl": ("units", "UnitLayout"),
    "qwen3_vl_moe": ("units", "UnitLayout"),
    "smolvlm": ("squares", "Idefics3Layout"),
}


def layout_for(config: Any, vision: Any = None) -> Any:
    """The :class:`~ocvtp.vlm.contracts.layout.Layout` of a model.

    Args:
        config: of the model, of a ``model_type`` in :data:`LAYOUTS`.
        vision: of its tower, if not ``config.vision_config``.

    Raises:
        UnsupportedModelError: a vision tower that is not known.
    """
    module, name = LAYOUTS[config.model_type]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)(config, vision)
