"""Qwen2-VL."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_vl

from ocvtp.serving.vllm.families.qwen import PrunedQwen
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedQwen,
    qwen2_vl.Qwen2VLForConditionalGeneration,
    qwen2_vl.Qwen2VLProcessingInfo,
    qwen2_vl.Qwen2VLMultiModalProcessor,
    qwen2_vl.Qwen2VLDummyInputsBuilder,
)
