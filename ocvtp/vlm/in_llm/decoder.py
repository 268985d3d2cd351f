"""The language model of a vision-language model: its parts, and whether tokens can be dropped inside it."""

from __future__ import annotations

from typing import Any

import torch

_PARTS = ("layers", "norm", "rotary_emb", "embed_tokens")
#: Their masks let image tokens see each other, or differ from layer to layer.
_REFUSED = {
    "gemma3": "its image tokens see each other, and its layers have masks of two kinds",
    "paligemma": "its prompt sees itself in both directions",
}


class Decoder:
    """What hooks need to know of a language model.

    Args:
        model: that has one in it.

    Raises:
        ValueError: none is found, or one whose layers don't all see everything before them.
    """

    def __init__(self, model: Any) -> None:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if family in _REFUSED:
            raise ValueError(
                f"tokens can't be dropped inside the language model of {family}: {_REFUSED[family]}"
            )
        self.text = _text_model(model)
        self.merger = _merger(model, self.text)
        config = self.text.config
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if kinds != {"full_attention"} or window:
            raise ValueError(
                f"tokens can't be dropped inside {type(self.text).__name__}: some of its layers see a "
                "window of what is before them"
            )
        if any(not hasattr(layer, "self_attn") for layer in self.text.layers):
            raise ValueError(f"not every layer of {type(self.text).__name__} has attention (self_attn)")
        #: Layers after which features of the encoder are added to all placeholders.
        stacked = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None)
        self.stacked = len(stacked or ())

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return len(self.text.layers)

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.text.config.num_attention_heads)

    @property
    def mrope(self) -> bool:
        """Whether positions have three dimensions."""
        config = self.text.config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return "mrope_section" in rope

    @property
    def frequencies(self) -> torch.Tensor:
        """``[d / 2]`` inverse frequencies of its rotary embedding."""
        found: torch.Tensor = self.text.rotary_emb.inv_freq
        return found


def _text_model(model: Any) -> Any:
    for module in model.modules():
        if all(hasattr(module, part) for part in _PARTS):
            return module
    raise ValueError(
        f"no language model with {', '.join(_PARTS)} in this {type(model).__name__}: tokens can't be "
        "dropped inside"
    )


def _merger(model: Any, text: Any) -> Any:
    """The module that puts image features among embeddings and calls the language model, if there is one.

    It gets ids as that gets embeddings; what is outside may hold a longer prompt, which the patch shortens.
    """
    for module in model.modules():
        children = dict(module.named_children())
        if any(child is text for child in children.values()) and "input_ids" in _parameters(module):
            return module
    return None


def _parameters(module: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(module).forward).parameters)
