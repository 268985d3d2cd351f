"""Qwen3-VL."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl

from ocvtp.serving.vllm.families.qwen import PrunedQwen
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedQwen,
    qwen3_vl.Qwen3VLForConditionalGeneration,
    qwen3_vl.Qwen3VLProcessingInfo,
    qwen3_vl.Qwen3VLMultiModalProcessor,
    qwen3_vl.Qwen3VLDummyInputsBuilder,
)
