"""Serving pruned models with servers that load ocvtp as a plug-in.

LLM(MODEL, **ocvtp.serving.engine_args(MODEL, keep=64, pruner="farthest_point"))
"""

from __future__ import annotations

from typing import Any


def engine_args(model: str, **settings: Any) -> dict[str, Any]:
    """What vLLM's ``LLM`` or ``EngineArgs`` is to be given on top, to serve ``model`` pruned.

    The model's configuration and the pruner are read and checked, its weights are not. vLLM need not be
    installed.

    Args:
        model: folder or Hub id.
        settings: fields of :class:`~ocvtp.serving.vllm.spec.Spec`: ``keep``, ``pruner``, ``merge`` and so on.

    Returns:
        ``{"hf_overrides": {"architectures": [...], "ocvtp": {...}}}``.

    Raises:
        UnsupportedModelError: a family that vLLM can't serve pruned; the message lists those it can.
        TypeError, ValueError: settings that make no sense, or that don't suit this model.
        OSError: no such model, or no such pruner.
    """
    from transformers import AutoConfig

    from ocvtp.serving.vllm.launch import overrides

    return {"hf_overrides": overrides(AutoConfig.from_pretrained(model), model, settings)}
