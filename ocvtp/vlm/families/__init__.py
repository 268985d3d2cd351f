"""The model families. One file tells one family; what several have in common is in a file of its own."""

from __future__ import annotations

import importlib
from typing import Any

from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.errors import UnsupportedModelError

#: ``config.model_type`` -> module of this folder and the adapter in it.
ADAPTERS: dict[str, tuple[str, str]] = {
    "gemma3": ("gemma", "Gemma3Adapter"),
    "idefics3": ("idefics3", "Idefics3Adapter"),
    "internvl": ("internvl", "InternVLAdapter"),
    "llava": ("llava", "LlavaAdapter"),
    "llava_next": ("llava_next", "LlavaNextAdapter"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionAdapter"),
    "paligemma": ("gemma", "PaliGemmaAdapter"),
    "qwen2_vl": ("qwen", "QwenAdapter"),
    "qwen2_5_vl": ("qwen", "QwenAdapter"),
    "qwen3_vl": ("qwen", "QwenAdapter"),
    "qwen3_vl_moe": ("qwen", "QwenAdapter"),
    "smolvlm": ("idefics3", "Idefics3Adapter"),
}


def adapter_for(model: Any) -> Adapter:
    """The adapter of ``model``.

    Raises:
        UnsupportedModelError: none knows it; the message lists those there are.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in ADAPTERS:
        raise UnsupportedModelError(
            f"can't prune {type(model).__name__} (model_type {family!r}); "
            f"supported: {', '.join(sorted(ADAPTERS))}"
        )
    module, name = ADAPTERS[family]
    made: Adapter = getattr(importlib.import_module(f"{__name__}.{module}"), name)(model)
    return made
