"""What counts as pixels."""

from __future__ import annotations

from typing import Any


def is_pixels(value: Any) -> bool:
    """Whether the value of an argument brings images or videos. Collators also pass tensors of none."""
    if value is None:
        return False
    shape = getattr(value, "shape", None)
    return bool(len(value) if shape is None else 0 not in shape)
