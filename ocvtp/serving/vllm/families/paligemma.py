"""PaliGemma: every picture is an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models import paligemma

from ocvtp.serving.vllm.families.squared import PrunedSquares
from ocvtp.serving.vllm.model import twin


class PrunedPaliGemma(PrunedSquares):
    """PaliGemma."""

    pixels_key = "data"  # vLLM's name here

    def pictures(self, image_input: Any) -> Sequence[int]:
        """See :class:`PrunedSquares`."""
        return [1] * len(image_input["data"])


Model = twin(
    PrunedPaliGemma,
    paligemma.PaliGemmaForConditionalGeneration,
    paligemma.PaliGemmaProcessingInfo,
    paligemma.PaliGemmaMultiModalProcessor,
    paligemma.PaliGemmaDummyInputsBuilder,
)
