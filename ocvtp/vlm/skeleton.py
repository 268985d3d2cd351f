"""A model of shapes alone, so that what can't work is told before weights are loaded."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.families import adapter_for


def skeleton_of(config: Any, **options: Any) -> Adapter:
    """The adapter of the model that ``config`` describes, without memory for its weights.

    Args:
        config: of transformers.
        options: of ``from_config``, such as ``attn_implementation``.

    Raises:
        UnsupportedModelError: none of ours.
        Exception: whatever transformers makes of a damaged configuration.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, **options)
    return adapter_for(model)
