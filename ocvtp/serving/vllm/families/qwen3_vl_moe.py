"""Qwen3-VL-MoE."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe

from ocvtp.serving.vllm.families.qwen import PrunedQwen
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedQwen,
    qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration,
    qwen3_vl_moe.Qwen3VLMoeProcessingInfo,
    qwen3_vl.Qwen3VLMultiModalProcessor,
    qwen3_vl.Qwen3VLDummyInputsBuilder,
)
