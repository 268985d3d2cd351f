"""PaliGemma: every picture is an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models import paligemma

from ocvtp.serving.vllm.families.squared import PrunedSquares
from ocvtp.serving.vllm.model import twin
from ocvtp.serving.vllm.taps import Tower


class PrunedPaliGemma(PrunedSquares):
    """PaliGemma."""

    pixels_key = "data"  # vLLM's name here
    vision_tower: Any

    def pictures(self, image_input: Any) -> Sequence[int]:
        """See :class:`PrunedSquares`."""
        return [1] * len(image_input["data"])

    def tower(self) -> Tower:
        """See :class:`PrunedSquares`."""
        body = self.vision_tower.vision_model
        return self.encoder(body, body.encoder.layers)


Model = twin(
    PrunedPaliGemma,
    paligemma.PaliGemmaForConditionalGeneration,
    paligemma.PaliGemmaProcessingInfo,
    paligemma.PaliGemmaMultiModalProcessor,
    paligemma.PaliGemmaDummyInputsBuilder,
)
