"""A prefill of fixed shape, as a CUDA graph.

At batch 1 the language model's prefill of a pruned prompt is so short that Python's launches take longer than
the GPU. Captured, it takes what the GPU takes, pruned and unpruned alike, and the saving shows. Prompts of
many lengths share a few graphs: each is filled up to a multiple of the bucket at its end, where causal
attention leaves no trace, so that no mask is needed. Proportional attention makes one, in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ocvtp.pruner import lane
from ocvtp.vlm.call.weighing import KEY, Weights

#: Prompts are filled up to multiples of this many tokens.
BUCKET = 64


class Recorder(Protocol):
    """Runs a function once to have its work done again by calling what it returns."""

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Results, whose memory every later call fills anew, and that call."""


def record_graph(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A :class:`Recorder`: as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisations can't be captured
        work()
    torch.cuda.current_stream().wait_stream(stream)
    results, graph = lane.record_graph(work, stream)
    return results, graph.replay


def record_nothing(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A :class:`Recorder` that needs no GPU: every call does the work again. As with a graph, results of the
    first run are there only after a call.
    """
    output = work()
    output.last_hidden_state.fill_(float("nan"))

    def replay() -> None:
        output.last_hidden_state.copy_(work().last_hidden_state)

    return output, replay


class CapturedPrefill:
    """Stands in for a language model's ``forward`` on embeddings of whole prompts without padding.

    Args:
        language_model: whose ``forward`` it replaces; in evaluation mode.
        record: how to do work again; a CUDA graph unless a test rehearses.
    """

    def __init__(self, language_model: Any, record: Recorder = record_graph) -> None:
        self._inner = language_model.forward
        self._record = record
        self._graphs: dict[tuple[int, ...], tuple[dict[str, torch.Tensor], Any, Callable[[], None]]] = {}

    @property
    def graphs(self) -> int:
        """How many were recorded."""
        return len(self._graphs)

    @torch.no_grad()
    def __call__(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None = None, **others: Any
    ) -> Any:
        """``[B, S, D]`` and ``[1 or B, S]`` (``[3, B, S]``) -> hidden states ``[B, S, D]`` and a cache.

        Both are overwritten by the next call of the same bucket.
        """
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
        bucket = -(-length // BUCKET) * BUCKET
        weights: Weights | None = others.get(KEY)
        key = (inputs_embeds.shape[0], bucket, *position_ids.shape[:-1], weights is not None)
        if key not in self._graphs:
            places = {
                "inputs_embeds": inputs_embeds.new_zeros(len(inputs_embeds), bucket, inputs_embeds.shape[2]),
                "position_ids": position_ids.new_zeros(*position_ids.shape[:-1], bucket),
            }
            if weights is not None:
                places["bias"] = weights.bias.new_zeros(len(weights.bias), bucket)
            output, replay = self._record(lambda: self._run(**places))
            self._graphs[key] = places, output, replay
        places, output, replay = self._graphs[key]
        if weights is not None:
            places["bias"][:, :length].copy_(weights.bias)
        places["inputs_embeds"][:, :length].copy_(inputs_embeds)
        places["position_ids"][..., :length].copy_(position_ids)
        replay()
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(
            last_hidden_state=output.last_hidden_state[:, :length], past_key_values=output.past_key_values
        )

    def _run(self, bias: torch.Tensor | None = None, **places: torch.Tensor) -> Any:
        """The work. Weights are new each time: they remember a mask, which must be made in here."""
        weights = {} if bias is None else {KEY: Weights(bias, None)}
        return self._inner(**places, **weights, use_cache=True)


@contextlib.contextmanager
def captured_prefill(model: Any, record: Recorder = record_graph) -> Iterator[CapturedPrefill]:
    """Have a model's language model prefill by graphs for the length of a block.

    Only for calls of ``forward`` on whole prompts that have no padding: the cache that comes with the result
    is filled beyond the prompt, so nothing can be decoded from it.
    """
    language_model = model.model.language_model
    captured = CapturedPrefill(language_model, record)
    language_model.__dict__["forward"] = captured
    try:
        yield captured
    finally:
        del language_model.__dict__["forward"]
