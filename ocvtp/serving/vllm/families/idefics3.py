"""Idefics3."""

from __future__ import annotations

from vllm.model_executor.models import idefics3

from ocvtp.serving.vllm.families.idefics import PrunedIdefics
from ocvtp.serving.vllm.model import twin

Model = twin(
    PrunedIdefics,
    idefics3.Idefics3ForConditionalGeneration,
    idefics3.Idefics3ProcessingInfo,
    idefics3.Idefics3MultiModalProcessor,
    idefics3.Idefics3DummyInputsBuilder,
)
