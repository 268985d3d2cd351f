"""Idefics3 and SmolVLM: an image's tiles stand apart in the prompt, each with its own name."""

from __future__ import annotations

from typing import Any

from ocvtp.serving.vllm.families.squared import PrunedSquares
from ocvtp.serving.vllm.taps import Tower


class PrunedIdefics(PrunedSquares):
    """Idefics3 and SmolVLM."""

    beside = ("pixel_attention_mask",)
    model: Any

    def tower(self) -> Tower:
        """See :class:`PrunedSquares`."""
        body = self.model.vision_model
        return self.encoder(body, body.encoder.layers)
