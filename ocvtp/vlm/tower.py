"""Runs a CLIP or SigLIP vision tower exactly as far as needed, layer by layer.

transformers runs every layer and can return attention maps only with eager attention. This loop calls the
tower's own submodules (so LoRA, quantised linears and offload hooks keep working), stops after the deepest
layer the language model consumes, works with any attention backend and needs no forward hooks, which threads
would share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch

from ocvtp_kernels.received_attention import received_attention

#: ``model_type`` of a tower -> whether its first token is a class token.
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}


def root(tower: Any) -> Any:
    """The module that holds embeddings and encoder (transformers < 5.10 nests it in ``vision_model``)."""
    return getattr(tower, "vision_model", tower)


class TowerRun:
    """Outputs of the layers that were asked for, and what the fill scores are made of.

    Attributes:
        outputs: layer index -> ``[B, tokens, C]``, bit-equal to ``hidden_states[index + 1]``.
    """

    def __init__(self, last_layer: Any, last_input: torch.Tensor, outputs: dict[int, torch.Tensor]) -> None:
        self.outputs = outputs
        self._last_layer = last_layer
        self._last_input = last_input

    @torch.no_grad()
    def received_attention(self, backend: str) -> torch.Tensor:
        """Attention each token receives in the deepest consumed layer, ``[B, tokens]``, at least float32.

        Mean over heads and all queries, the class token among them, as in OC-VTP. Queries and keys are
        projected a second time from the layer's input (0.7 % of a CLIP-L tower): catching them on their way
        would take forward hooks, which concurrent calls trip over.
        """
        attention = self._last_layer.self_attn
        x = self._last_layer.layer_norm1(self._last_input)
        heads = attention.num_heads
        query = attention.q_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = attention.k_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        return received_attention(query, key, attention.scale, backend=backend)


def run_tower(
    tower: Any,
    pixel_values: torch.Tensor,
    taps: Collection[int],
    after: Callable[[int, torch.Tensor], None] | None = None,
) -> TowerRun:
    """Run the tower up to its deepest tapped layer.

    Args:
        tower: ``CLIPVisionModel`` or ``SiglipVisionModel``.
        pixel_values: ``[B, 3, H, W]``.
        taps: indices of the layers whose outputs are wanted.
        after: called with each of them as soon as it is there, before the next layer runs.
    """
    body = root(tower)
    hidden = body.embeddings(pixel_values)
    if hasattr(body, "pre_layrnorm"):  # spelled like this upstream; SigLIP has none
        hidden = body.pre_layrnorm(hidden)
    outputs: dict[int, torch.Tensor] = {}
    layer, layer_input = None, hidden
    for index, layer in enumerate(itertools.islice(body.encoder.layers, max(taps) + 1)):
        layer_input = hidden
        hidden = layer(hidden, None)
        if isinstance(hidden, tuple):  # some releases return (hidden, weights)
            hidden = hidden[0]
        if index in taps:
            outputs[index] = hidden
            if after is not None:
                after(index, hidden)
    return TowerRun(layer, layer_input, outputs)
