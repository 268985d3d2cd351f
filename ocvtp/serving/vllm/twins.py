"""Which of vLLM's architectures have a pruned twin."""

from __future__ import annotations

from typing import Any, NamedTuple

#: In front of an architecture's name, its twin's. The end matters: vLLM's defaults go by it.
PREFIX = "Ocvtp"


class Twin(NamedTuple):
    """A model of vLLM's, and ours in front of it.

    Attributes:
        architecture: vLLM's name.
        module: with our class, ``Model``. A module each: what a new vLLM breaks of one, the others outlive.
    """

    architecture: str
    module: str


def _twin(architecture: str, module: str) -> Twin:
    return Twin(f"{architecture}ForConditionalGeneration", f"ocvtp.serving.vllm.families.{module}")


#: By ``config.model_type``.
TWINS = {
    "gemma3": _twin("Gemma3", "gemma3"),
    "idefics3": _twin("Idefics3", "idefics3"),
    "internvl": _twin("InternVL", "internvl"),
    "llava": _twin("Llava", "llava"),
    "llava_next": _twin("LlavaNext", "llava_next"),
    "llava_onevision": _twin("LlavaOnevision", "llava_onevision"),
    "paligemma": _twin("PaliGemma", "paligemma"),
    "qwen2_vl": _twin("Qwen2VL", "qwen2_vl"),
    "qwen2_5_vl": _twin("Qwen2_5_VL", "qwen2_5_vl"),
    "qwen3_vl": _twin("Qwen3VL", "qwen3_vl"),
    "qwen3_vl_moe": _twin("Qwen3VLMoe", "qwen3_vl_moe"),
    "smolvlm": _twin("SmolVLM", "smolvlm"),
}


def architecture_of(config: Any, model: str) -> str:
    """Name of the pruned twin of a model.

    Args:
        config: of the model.
        model: what to call it in the error.

    Raises:
        UnsupportedModelError: it has none; the message lists those that have.
    """
    if config.model_type not in TWINS:
        from ocvtp.vlm import UnsupportedModelError  # torch and transformers, which register() has no use for

        raise UnsupportedModelError(
            f"ocvtp can't prune {model} (model_type {config.model_type!r}) in vLLM; "
            f"supported: {', '.join(sorted(TWINS))}"
        )
    return PREFIX + TWINS[config.model_type].architecture
