"""LLaVA-NeXT."""

from __future__ import annotations

from vllm.model_executor.models import llava, llava_next

from ocvtp.serving.vllm.families.tiled import PrunedTiles
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedTiles,
    llava_next.LlavaNextForConditionalGeneration,
    llava_next.LlavaNextProcessingInfo,
    llava_next.LlavaNextMultiModalProcessor,
    llava.LlavaDummyInputsBuilder,
)
