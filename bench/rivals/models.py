"""The small models that official implementations were run on, as transformers builds them today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: Of the language model behind the tower: nothing of it is compared, but a VLM has one.
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
IMAGE = 120
_PROJECTOR = "projector."


def llava(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A LLaVA with the tower and the projector of ``tower_clip``.

    Args:
        about: the file's metadata.
        tensors: of the file.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**about["params"]["vision_config"]),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    _load(getattr(tower, "vision_model", tower), tensors, "vision.")
    _load(model.model.multi_modal_projector, tensors, _PROJECTOR)
    return model


def clip(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The whole CLIP of ``tower_clip``; arguments as for :func:`llava`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    params = about["params"]
    config = CLIPConfig(
        text_config=CLIPTextConfig(**params["text_config"]).to_dict(),
        vision_config=CLIPVisionConfig(**params["vision_config"]).to_dict(),
        projection_dim=params["text_config"]["projection_dim"],
    )
    model = CLIPModel(config).eval()
    _load(getattr(model.vision_model, "vision_model", model.vision_model), tensors, "vision.")
    _load(getattr(model.text_model, "text_model", model.text_model), tensors, "text.")
    for name in ("visual_projection", "text_projection"):
        _load(getattr(model, name), tensors, f"{name}.")
    return model


def qwen(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The Qwen2.5-VL of ``tower_qwen``; arguments as for :func:`llava`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    params = about["params"]
    text = dict(params["text_config"])
    beside = {name: text.pop(name) for name in list(text) if name.endswith("_token_id")}
    tied = text.pop("tie_word_embeddings")
    text |= {"bos_token_id": None, "eos_token_id": None}
    text["rope_parameters"] = {"rope_theta": 1e6, **text.pop("rope_scaling")}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=params["vision_config"], tie_word_embeddings=tied, **beside
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    _load(model.model.visual, tensors, "visual.")
    _load(model.model.language_model, tensors, "model.")
    _load(model.lm_head, tensors, "lm_head.")
    return model


def _load(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Weights of ``prefix``, all of them and nothing else; buffers that are computed may be missing."""
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    missing, unexpected = module.load_state_dict(state, strict=False)
    lacking = [name for name in missing if not name.endswith("position_ids")]
    surplus = [name for name in unexpected if not name.endswith("position_ids")]
    if lacking or surplus:
        raise ValueError(f"weights {prefix}* don't fit: missing {lacking}, unexpected {surplus}")
