"""What vLLM learns of our classes is what it learns of its own, but where we mean it."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest

from ocvtp.serving.vllm.twins import TWINS, Twin

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

#: Where ours differ from vLLM's.
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

    ours = dataclasses.asdict(_ModelInfo.from_model_cls(importlib.import_module(twin.module).Model))
    file, theirs_name = _VLLM_MODELS[twin.architecture]
    file = file if file.startswith("vllm.") else f"vllm.model_executor.models.{file}"
    theirs = dataclasses.asdict(
        _ModelInfo.from_model_cls(getattr(importlib.import_module(file), theirs_name))
    )
    assert {key: ours[key] for key in ours if ours[key] != theirs[key]} == DIFFERENT.get(family, {})
