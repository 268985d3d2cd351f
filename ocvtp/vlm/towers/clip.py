"""Runs a CLIP or SigLIP vision tower exactly as far as needed, layer by layer.

transformers runs every layer and can return attention maps only with eager attention. This loop calls the
tower's own submodules (so LoRA, quantised linears and offload hooks keep working), stops after the deepest
layer the language model consumes, or, if asked to, in the middle of it, works with any attention backend and
needs no forward hooks, which threads would share. What each step saves: ``docs/tower.md``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.contracts.weights import inside
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.selection import gather_tokens


def root(tower: Any) -> Any:
    """The module that holds embeddings and encoder (transformers < 5.10 nests it in ``vision_model``)."""
    return getattr(tower, "vision_model", tower)


def embedded(body: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W] -> [B, tokens, C]``: what the first layer of a :func:`root` gets."""
    hidden: torch.Tensor = body.embeddings(pixel_values)
    if hasattr(body, "pre_layrnorm"):  # spelled like this upstream; SigLIP has none
        hidden = body.pre_layrnorm(hidden)
    return hidden


class LayerInput:
    """What an encoder layer got, and what its attention makes of that.

    Queries and keys are projected a second time: catching them on their way would take forward hooks, which
    concurrent calls trip over.

    Args:
        layer: ``CLIPEncoderLayer`` or ``SiglipEncoderLayer``.
        hidden: its input, ``[B, tokens, C]``.
    """

    def __init__(self, layer: Any, hidden: torch.Tensor) -> None:
        self._layer = layer
        self._input = hidden

    @property
    def layer(self) -> Any:
        """The layer."""
        return self._layer

    @property
    def hidden(self) -> torch.Tensor:
        """``[B, tokens, C]`` that it got."""
        return self._input

    def received_attention(self, backend: str) -> torch.Tensor:
        """See :meth:`TowerRun.received_attention`."""
        return _received(self._layer.self_attn, *self.query_key(), backend)

    def of(self, which: Sequence[int]) -> LayerInput:
        """The same of some images only."""
        return LayerInput(self._layer, some_of(self._input, which))

    def attention(self, query: torch.Tensor, key: torch.Tensor, backend: str) -> torch.Tensor:
        """``[B, tokens]``, at least float32: what keys receive of queries, mean over heads and queries."""
        return _received(self._layer.self_attn, query, key, backend)

    def heads_of(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, tokens, C] -> [B, heads, tokens, C / heads]``."""
        return _heads(x, self._layer.self_attn.num_heads)

    def query_key(self, queries: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, queries, C]`` of the first tokens (``None``: all), and ``[B, tokens, C]``."""
        found: tuple[torch.Tensor, torch.Tensor] = inside(
            (self._layer, self._layer.self_attn), functools.partial(self._query_key, queries), self._input
        )
        return found

    def _query_key(self, queries: int | None, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention, x = self._layer.self_attn, self._layer.layer_norm1(hidden)
        return attention.q_proj(x[:, :queries]), attention.k_proj(x)


class WholeLayer(LayerInput):
    """An encoder layer that has run.

    Args:
        layer: ``CLIPEncoderLayer`` or ``SiglipEncoderLayer``.
        hidden: its input, ``[B, tokens, C]``.
        output: its output.
    """

    def __init__(self, layer: Any, hidden: torch.Tensor, output: torch.Tensor) -> None:
        super().__init__(layer, hidden)
        self._output = output

    def rows(self, indices: torch.Tensor, which: Sequence[int] | None = None) -> torch.Tensor:
        """See :meth:`TowerRun.finish`."""
        output = _of(self._output, which)
        return gather_tokens(output, indices.to(output.device))

    def flat_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """See :meth:`TowerRun.finish_flat`."""
        return _flat_rows(self._output, indices)


class HeldLayer(LayerInput):
    """An encoder layer stopped before its attention: the rest is computed for the rows that are wanted.

    After attention every token goes its own way, so the rest of a layer (two thirds of its work) need not be
    done for tokens that nobody reads. Queries, keys and values are projected once, of all tokens: all are
    attended to, and the queries of all count in the scores.

    Attention is PyTorch's ``scaled_dot_product_attention`` whatever the tower was told to use. Rows equal
    those of the whole layer up to rounding: other sizes of matrices, other order of sums.

    Args:
        layer: ``CLIPEncoderLayer`` or ``SiglipEncoderLayer``. Its submodules are called, it itself is not:
            hooks on them fire, those on the layer and on its ``self_attn`` don't. Where its weights are
            brought when it is called, all of this has to happen inside of both (:func:`.inside`).
        hidden: its input, ``[B, tokens, C]``.
    """

    def __init__(self, layer: Any, hidden: torch.Tensor) -> None:
        attention = layer.self_attn
        super().__init__(layer, hidden)
        x = layer.layer_norm1(hidden)
        self._query = attention.q_proj(x)
        self._key = attention.k_proj(x)
        self._value = attention.v_proj(x)

    def query_key(self, queries: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`LayerInput`; they are here already."""
        return self._query[:, :queries], self._key

    def rows(self, indices: torch.Tensor, which: Sequence[int] | None = None) -> torch.Tensor:
        """See :meth:`TowerRun.finish`."""
        query = gather_tokens(_of(self._query, which), indices.to(self._query.device))
        attended = self._attend(query, _of(self._key, which), _of(self._value, which))
        residual = gather_tokens(_of(self._input, which), indices.to(self._input.device))
        return self._rest(residual, attended)

    def flat_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """See :meth:`TowerRun.finish_flat`."""
        attended = self._attend(self._query, self._key, self._value)
        return self._rest(_flat_rows(self._input, indices), _flat_rows(attended, indices))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[B, k, C]`` attends to ``[B, tokens, C]``."""
        attention = self._layer.self_attn
        heads = attention.num_heads
        attended = torch.nn.functional.scaled_dot_product_attention(
            _heads(query, heads),
            _heads(key, heads),
            _heads(value, heads),
            dropout_p=attention.dropout if attention.training else 0.0,
            scale=attention.scale,
        )
        return attended.transpose(1, 2).flatten(2)

    def _rest(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention, for the rows given."""
        layer = self._layer
        hidden = layer.self_attn.out_proj(attended)
        hidden = residual.to(hidden.device) + hidden  # weights may lie on another device than the input
        out: torch.Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
        return out


class TowerRun:
    """Outputs of the layers that were asked for, and what the fill scores are made of.

    Attributes:
        outputs: layer index -> ``[B, tokens, C]``, bit-equal to ``hidden_states[index + 1]``. Without the
            deepest layer if that is held.
        inputs: layer index -> that layer, for the deepest and those asked for.
    """

    def __init__(
        self,
        outputs: dict[int, torch.Tensor],
        deepest: WholeLayer | HeldLayer,
        inputs: dict[int, LayerInput],
    ) -> None:
        self.outputs = outputs
        self.inputs = inputs
        self._deepest = deepest

    def received_attention(self, backend: str, layer: int | None = None) -> torch.Tensor:
        """Attention each token receives in a layer, ``[B, tokens]``, at least float32.

        Mean over heads and all queries, the class token among them, as in OC-VTP. Unless the layer is held,
        its queries and keys are projected again (0.7 % of a CLIP-L tower), to the same bits.

        Args:
            backend: of the operation.
            layer: one of :attr:`inputs`; default: the deepest consumed one.
        """
        with torch.no_grad():
            return (self._deepest if layer is None else self.inputs[layer]).received_attention(backend)

    def finish(self, indices: torch.Tensor, which: Sequence[int] | None = None) -> torch.Tensor:
        """Output of the deepest layer at some tokens: computed now if the layer is held, else taken.

        Args:
            indices: ``[images, k]`` int64 in ``[0, tokens)``, the class token counted.
            which: the images they are of; all by default.

        Returns:
            ``[images, k, C]``, differentiable.

        Raises:
            TypeError, ValueError: indices of another type, or for another number of images.
        """
        return self._deepest.rows(indices, which)

    def finish_flat(self, indices: torch.Tensor) -> torch.Tensor:
        """:meth:`finish` for images of which different numbers of tokens are wanted.

        Tiles, for instance, among which one choice is made. Of a held layer, attention is computed for all
        tokens then, a tenth of the layer, and the rest for those wanted.

        Args:
            indices: ``[k]`` int64: tokens, counted through all images (``image * tokens + token``).

        Returns:
            ``[k, C]``, differentiable.

        Raises:
            TypeError, ValueError: indices of another type or shape.
        """
        return self._deepest.flat_rows(indices)


def run_tower(
    tower: Any,
    pixel_values: torch.Tensor,
    taps: Collection[int],
    after: Callable[[int, torch.Tensor], None] | None = None,
    *,
    hold: bool = False,
    scored: Collection[int] = (),
    ahead: Callable[[LayerInput], None] | None = None,
) -> TowerRun:
    """Run the tower up to its deepest tapped layer.

    Args:
        tower: ``CLIPVisionModel`` or ``SiglipVisionModel``.
        pixel_values: ``[B, 3, H, W]``.
        taps: indices of the layers whose outputs are wanted.
        after: called with each of them as soon as it is there, before the next layer runs. Not with one that
            is held.
        hold: stop in the middle of the deepest layer; :meth:`TowerRun.finish` computes the rows that are
            wanted (:class:`HeldLayer`). Of several consumed layers the others run whole.
        scored: earlier layers whose attention will be asked for.
        ahead: called with the deepest layer's input before that layer runs, unless it is held.
    """
    body = root(tower)
    hidden = embedded(body, pixel_values)
    outputs: dict[int, torch.Tensor] = {}
    inputs: dict[int, LayerInput] = {}
    deepest = max(taps)
    layer, layer_input = None, hidden
    for index, layer in enumerate(itertools.islice(body.encoder.layers, deepest + 1)):
        if hold and index == deepest:
            held = HeldLayer(layer, hidden)
            return TowerRun(outputs, held, {**inputs, index: held})
        if index in scored:
            inputs[index] = LayerInput(layer, hidden)
        if ahead is not None and index == deepest:
            ahead(LayerInput(layer, hidden))
        layer_input, hidden = hidden, layer(hidden, None)
        if isinstance(hidden, tuple):  # some releases return (hidden, weights)
            hidden = hidden[0]
        if index in taps:
            outputs[index] = hidden
            if after is not None:
                after(index, hidden)
    whole = WholeLayer(layer, layer_input, hidden)
    return TowerRun(outputs, whole, {**inputs, deepest: whole})


def _received(attention: Any, query: torch.Tensor, key: torch.Tensor, backend: str) -> torch.Tensor:
    heads = attention.num_heads
    return received_attention(_heads(query, heads), _heads(key, heads), attention.scale, backend=backend)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, tokens, C] -> [B, heads, tokens, C / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _of(tensor: torch.Tensor, which: Sequence[int] | None) -> torch.Tensor:
    """Some images of a batch."""
    return tensor if which is None else some_of(tensor, which)


def _flat_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``[B, tokens, C] -> [k, C]``, tokens counted through all images."""
    return gather_tokens(x.flatten(0, 1)[None], indices[None].to(x.device))[0]
