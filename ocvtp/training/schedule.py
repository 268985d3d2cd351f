"""The learning rate of every step."""

from __future__ import annotations

import math


def warm_cosine(step: int, steps: int, warm: int, highest: float, final: float) -> float:
    """Learning rate of ``step`` (from 0) of ``steps``: ``warm`` steps up to ``highest``, a cosine down.

    The first step already learns (``highest / warm``), and the last is at ``final``.
    """
    if step < warm:
        return highest * (step + 1) / warm
    way = (step - warm + 1) / max(1, steps - warm)
    return final + (highest - final) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, way)))
