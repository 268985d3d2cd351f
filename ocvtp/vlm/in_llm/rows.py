"""What a method may ask of a batch at a cut, computed from the layers as they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.methods.in_llm.ranking import of_rows
from ocvtp.vlm.in_llm.decoder import Decoder
from ocvtp.vlm.in_llm.layout import Layout, packed
from ocvtp.vlm.in_llm.squeeze import at_columns


class Tap:
    """A cache that remembers the keys of one layer as the layer itself computed them, rotated and all.

    Args:
        cache: that it lies on; ``None``: none.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.keys: torch.Tensor | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the cache underneath returns, or without one what came."""
        self.keys = keys
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


class CutRows:
    """The rows of a batch at a cut: see :class:`ocvtp.methods.in_llm.Rows`.

    Args:
        decoder: the language model.
        cut: 0-based layer before which it is.
        hidden: ``[B, S, D]`` that comes in.
        layout: of its columns.
        totals: vision tokens of each row's prompt.
        before: input ``[B, S, D]`` of the layer before, and its arguments by name.
        tap: that layer's keys.
        arguments: of the layer behind, if nothing were dropped.
        embeddings: ``[B, L, D]`` that the language model began with.
        memory: the method's, of this prompt.
    """

    def __init__(
        self,
        decoder: Decoder,
        cut: int,
        hidden: torch.Tensor,
        layout: Layout,
        totals: tuple[int, ...],
        before: tuple[torch.Tensor, Mapping[str, Any]],
        tap: Tap,
        arguments: Mapping[str, Any],
        embeddings: torch.Tensor,
        memory: dict[str, torch.Tensor],
    ) -> None:
        self._decoder, self._cut, self._layout = decoder, cut, layout
        self._before, self._tap, self._arguments = before, tap, arguments
        self.hidden, self.embeddings, self.memory = hidden, embeddings.to(hidden.device), memory
        self.present, self.totals, self.words = layout.present, totals, layout.words
        self.vision, self.is_vision = packed(layout.vision, layout.present)
        self.text, self.is_text = packed(layout.text, layout.words)
        column = torch.arange(hidden.shape[1], device=hidden.device)[None]
        self.last = torch.where(layout.said, column, 0).amax(1)
        self.start = torch.where(layout.live, column, hidden.shape[1] - 1).amin(1)

    @property
    def columns(self) -> torch.Tensor:
        """``[B, S]`` int64 column of the prompt, -1 for padding."""
        return self._layout.columns

    @property
    def positions(self) -> torch.Tensor:
        """``[B, S]`` int64."""
        return self._layout.positions

    @property
    def frequencies(self) -> torch.Tensor:
        """``[d / 2]``."""
        return self._decoder.frequencies.to(self.hidden.device)

    def normed(self) -> torch.Tensor:
        """``[B, S, D]`` behind the language model's last norm."""
        found: torch.Tensor = self._decoder.text.norm(self.hidden)
        return found

    def keys(self) -> torch.Tensor:
        """``[B, key heads, S, d]`` of the layer before."""
        if self._tap.keys is None:
            raise ValueError(
                "the layer before a cut put no keys into its cache, so nobody knows what it attended to: "
                "was its attention replaced?"
            )
        return self._tap.keys.to(self.hidden.device)

    def attention(self, columns: torch.Tensor) -> torch.Tensor:
        """``[B, heads, R, S]`` float32 of the layer before."""
        hidden, arguments = self._before
        layer = self._decoder.text.layers[self._cut - 1]
        queries = _project(
            layer, "q", of_rows(hidden, columns.to(hidden.device)), _angles(arguments, columns)
        )
        return self._softmax(layer, queries.to(self.hidden.device), self.keys(), columns)

    def next_attention(self, columns: torch.Tensor) -> torch.Tensor:
        """``[B, heads, R, S]`` float32 of the layer behind, whose keys are projected twice for it."""
        layer = self._decoder.text.layers[self._cut]
        everything = torch.arange(self.hidden.shape[1], device=columns.device).expand(len(columns), -1)
        queries = _project(layer, "q", of_rows(self.hidden, columns), _angles(self._arguments, columns))
        keys = _project(layer, "k", self.hidden, _angles(self._arguments, everything))
        return self._softmax(layer, queries.to(self.hidden.device), keys.to(self.hidden.device), columns)

    def _softmax(
        self, layer: Any, queries: torch.Tensor, keys: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Over what each query sees: live columns up to its own."""
        batch, heads, rows, width = queries.shape
        # Heads that share keys are further rows of one product, so that nothing is repeated.
        grouped = queries.float().reshape(batch, keys.shape[1], -1, width)
        logits = (grouped @ keys.float().transpose(2, 3)).view(
            batch, heads, rows, -1
        ) * layer.self_attn.scaling
        key = torch.arange(keys.shape[2], device=keys.device)
        seen = (key <= columns[:, :, None]) & self._layout.live[:, None]
        return logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)


def _angles(arguments: Mapping[str, Any], columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = arguments["position_embeddings"]
    return at_columns(cos, columns), at_columns(sin, columns)


def _project(
    layer: Any, which: str, states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """``[B, heads, R, d]``: queries or keys of a layer for some rows of its input, as it makes them."""
    attention = layer.self_attn
    made = getattr(attention, f"{which}_proj")(layer.input_layernorm(states))
    made = made.view(*states.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    made = (made if norm is None else norm(made)).transpose(1, 2)
    cos, sin = (table.to(made.device) for table in angles)
    module = sys.modules[type(attention).__module__]
    if cos.ndim == 3:
        found: torch.Tensor = module.apply_rotary_pos_emb(made, made, cos, sin)[0]
        return found
    config = attention.config  # older releases of Qwen-VL interleave the three dimensions here
    rope = getattr(attention, "rope_scaling", None) or config.rope_parameters
    mixed: torch.Tensor = module.apply_multimodal_rotary_pos_emb(made, made, cos, sin, rope["mrope_section"])[
        0
    ]
    return mixed
