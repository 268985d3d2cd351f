"""SmolVLM."""

from __future__ import annotations

from vllm.model_executor.models import idefics3, smolvlm

from ocvtp.serving.vllm.families.idefics import PrunedIdefics
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedIdefics,
    smolvlm.SmolVLMForConditionalGeneration,
    smolvlm.SmolVLMProcessingInfo,
    idefics3.Idefics3MultiModalProcessor,
    idefics3.Idefics3DummyInputsBuilder,
)
