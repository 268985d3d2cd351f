"""What vLLM learns of our classes, which it remembers on disk by the hash of a family's file alone."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest

from ocvtp.serving.vllm.twins import TWINS, Twin

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

#: Where ours differ from vLLM's. Whoever changes this has to change every file of
#: ``ocvtp/serving/vllm/families`` that it concerns, if only a comment: after an update of ocvtp, vLLM would
#: otherwise go by what it learned of the old class.
DIFFERENT: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"supports_multimodal_encoder_tp_data": False, "supported_video_pruning_methods": ("evs",)},
    "qwen2_5_vl": {"supports_multimodal_encoder_tp_data": False},
    "qwen3_vl": {"supports_multimodal_encoder_tp_data": False, "supported_video_pruning_methods": ("evs",)},
    "qwen3_vl_moe": {
        "supports_multimodal_encoder_tp_data": False,
        "supported_video_pruning_methods": ("evs",),
    },
}


@pytest.mark.quick
@pytest.mark.parametrize(("family", "twin"), TWINS.items(), ids=TWINS)
def test_a_twin_is_like_its_model(family: str, twin: Twin) -> None:
    from vllm.model_executor.models.registry import _VLLM_MODELS, _ModelInfo

    module, name = twin.where.split(":")
    ours = dataclasses.asdict(_ModelInfo.from_model_cls(getattr(importlib.import_module(module), name)))
    file, theirs_name = _VLLM_MODELS[twin.architecture]
    file = file if file.startswith("vllm.") else f"vllm.model_executor.models.{file}"
    theirs = dataclasses.asdict(
        _ModelInfo.from_model_cls(getattr(importlib.import_module(file), theirs_name))
    )
    assert {key: ours[key] for key in ours if ours[key] != theirs[key]} == DIFFERENT.get(family, {})
