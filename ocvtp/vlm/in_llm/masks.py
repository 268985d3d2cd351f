"""Attention masks of layers that hold fewer tokens than the first, made by transformers itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch


class LayerView:
    """What transformers' mask functions ask of a cache, answered by one of its layers.

    Newer releases can be told which layer; older ones ask the first, which holds the long prompt.

    Args:
        cache: the whole.
        layer: whose lengths count.
    """

    # Asked for by one release or another, layer by layer: here is one, which sees everything.
    is_sliding, is_linear, is_dummy = (False,), (False,), (False,)

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer
        self.is_compileable = getattr(cache, "is_compileable", False)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Keys, and the first one's offset; ``query`` is a length or, in older releases, positions."""
        found: tuple[int, int] = self._cache.get_mask_sizes(query, self._layer)
        return found

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens in the layer."""
        return self._cache.get_seq_length(self._layer)

    get_query_offset = get_seq_length


class MaskMaker:
    """Makes the masks of a language model's layers, whatever its attention implementation.

    Args:
        text: the language model.
    """

    def __init__(self, text: Any) -> None:
        self._config, self._depth = text.config, len(text.layers)
        self._make = sys.modules[type(text).__module__].create_causal_mask
        self._names = frozenset(inspect.signature(self._make).parameters)

    def __call__(self, cache: Any, layer: int, hidden: torch.Tensor, live: torch.Tensor | None) -> Any:
        """The mask of ``layer`` and those like it.

        Args:
            cache: before the layer is added to; ``None``: none.
            layer: 0-based.
            hidden: ``[B, S, D]`` that the layer gets.
            live: ``[B, cached + S]`` bool; ``None``: no padding.
        """
        view = None if cache is None else LayerView(cache, min(layer, self._depth - 1))
        embeds = "inputs_embeds" if "inputs_embeds" in self._names else "input_embeds"
        given = {"config": self._config, embeds: hidden, "past_key_values": view}
        given["attention_mask"] = None if live is None else live.long()
        if "cache_position" in self._names:
            given["cache_position"] = positions_behind(view, hidden)
        return self._make(**given)


def positions_behind(cache: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``[S]``: columns of a call's tokens in a layer's cache, as older releases pass along."""
    start = 0 if cache is None else cache.get_seq_length()
    return torch.arange(hidden.shape[1], device=hidden.device) + start


def seen_by_last(mask: Any, cache: Any, columns: int) -> torch.Tensor | None:
    """``[B, columns]`` bool: which columns are no padding, by what the language model got for a mask.

    Static caches get masks that ``generate`` has prepared: what their last query sees.

    Raises:
        ValueError: a mask of the caller's own making, of which tokens can't be dropped.
    """
    if isinstance(mask, Mapping):
        if set(mask) != {"full_attention"}:
            raise ValueError(f"tokens can't be dropped inside layers of several kinds: {', '.join(mask)}")
        mask = mask["full_attention"]
    if mask is None:
        return None
    prepared = getattr(cache, "is_compileable", False)
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4) or (mask.ndim == 4 and not prepared):
        raise ValueError("dropping tokens inside the language model needs a 2-D attention_mask")
    if mask.ndim == 4:
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last == 0
    return mask[:, :columns].bool()
