"""Qwen2.5-VL."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_5_vl

from ocvtp.serving.vllm.families.qwen import PrunedQwen
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedQwen,
    qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
    qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
