"""What counts as pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ocvtp.vlm.contracts.adapter import Adapter


def is_pixels(value: Any) -> bool:
    """Whether the value of an argument brings images or videos. Collators also pass tensors of none."""
    if value is None:
        return False
    shape = getattr(value, "shape", None)
    return bool(len(value) if shape is None else 0 not in shape)


def pixels_in(adapter: Adapter, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Modality -> the argument with its pixels, for those that a call brings along."""
    return {kind: key for kind, key in adapter.pixel_keys.items() if is_pixels(arguments.get(key))}
