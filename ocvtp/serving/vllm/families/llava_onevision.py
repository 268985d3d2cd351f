"""LLaVA-OneVision: images."""

from __future__ import annotations

from vllm.model_executor.models import llava_onevision

from ocvtp.serving.vllm.counts import OnevisionCounts
from ocvtp.serving.vllm.families.tiled import PrunedTiles
from ocvtp.serving.vllm.model import twin


class PrunedOnevision(PrunedTiles):
    """LLaVA-OneVision."""

    counts_class = OnevisionCounts


Model = twin(
    PrunedOnevision,
    llava_onevision.LlavaOnevisionForConditionalGeneration,
    llava_onevision.LlavaOnevisionProcessingInfo,
    llava_onevision.LlavaOnevisionMultiModalProcessor,
    llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
