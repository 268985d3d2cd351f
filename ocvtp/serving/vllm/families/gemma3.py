"""Gemma 3: a crop of pan and scan is a picture of its own."""

from __future__ import annotations

from vllm.model_executor.models import gemma3_mm

from ocvtp.serving.vllm.families.squared import PrunedSquares
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedSquares,
    gemma3_mm.Gemma3ForConditionalGeneration,
    gemma3_mm.Gemma3ProcessingInfo,
    gemma3_mm.Gemma3MultiModalProcessor,
    gemma3_mm.Gemma3DummyInputsBuilder,
)
