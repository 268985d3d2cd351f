"""Gemma 3: a crop of pan and scan is a picture of its own."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import gemma3_mm

from ocvtp.serving.vllm.families.squared import PrunedSquares
from ocvtp.serving.vllm.model import twin
from ocvtp.serving.vllm.taps import Tower


class PrunedGemma3(PrunedSquares):
    """Gemma 3."""

    vision_tower: Any

    def tower(self) -> Tower:
        """See :class:`PrunedSquares`."""
        body = self.vision_tower.vision_model
        return self.encoder(body, body.encoder.layers)


Model = twin(
    PrunedGemma3,
    gemma3_mm.Gemma3ForConditionalGeneration,
    gemma3_mm.Gemma3ProcessingInfo,
    gemma3_mm.Gemma3MultiModalProcessor,
    gemma3_mm.Gemma3DummyInputsBuilder,
)
