"""What passes a vision tower: caught by hooks on vLLM's own modules, for the length of one call.

A worker runs one call at a time, so hooks are safe here. They are not if the tower is compiled or replayed as
a CUDA graph, which :mod:`ocvtp.serving.vllm.model` refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp_kernels.received_attention import received_attention

_NORMS = ("layer_norm1", "norm1", "layernorm_before")


@dataclass(frozen=True)
class Tower:
    """A vision tower of vLLM's.

    Attributes:
        layers: up to the last one that is consumed.
        tail: what reads the output of the last of them first; ``None`` if nothing does before it is returned.
        scored: the layer whose attention counts; ``None`` if nobody asks.
    """

    layers: Sequence[Any]
    tail: Any
    scored: int | None


class Tap:
    """Queries and keys of one layer's attention.

    Args:
        asked: whether anybody will want them.
    """

    def __init__(self, asked: bool) -> None:
        self._asked = asked
        self._query: torch.Tensor | None = None
        self._key: torch.Tensor | None = None
        self._scale = 1.0

    @property
    def full(self) -> bool:
        """Whether there is what was asked for."""
        return not self._asked or self._query is not None

    def catch(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before vLLM's attention of images, which gets queries and keys as they are multiplied."""
        query, key = (kwargs["query"], kwargs["key"]) if "query" in kwargs else args[:2]
        shape = (*query.shape[:2], attention.num_heads, attention.head_size)
        self._query, self._key = (x.reshape(shape).transpose(1, 2) for x in (query, key))
        self._scale = attention.scale

    def received(self, backend: str, bounds: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, N]``: attention that every token receives, mean over the heads of all ranks.

        Args:
            backend: of the operation.
            bounds: of frames in one sequence, ``[frames + 1]``.
        """
        assert self._query is not None
        assert self._key is not None
        scores = received_attention(self._query, self._key, self._scale, cu_seqlens=bounds, backend=backend)
        return _mean_over_ranks(scores)


@contextlib.contextmanager
def tapped(tower: Tower, read: int | None, after: Callable[[torch.Tensor], None]) -> Iterator[Tap]:
    """Catch what passes while the block runs.

    Args:
        tower: that will run.
        read: the layer whose output ``after`` is called with, as soon as it is there. Kernels that follow may
            write to it.
        after: see ``read``.
    """
    tap, hooks = Tap(tower.scored is not None), []
    if read is not None:
        # A layer's output is what is normalised next. Layers themselves may be called around hooks (vLLM's
        # compile decorator), their submodules are not.
        behind = _norm(tower.layers[read + 1]) if read + 1 < len(tower.layers) else tower.tail
        if behind is not None:
            hooks.append(behind.register_forward_pre_hook(lambda module, args: after(args[0])))
        else:
            last = tower.layers[read]
            hooks.append(last.register_forward_hook(lambda module, args, output: after(_hidden(output))))
    if tower.scored is not None:
        attention = _attention(tower.layers[tower.scored])
        hooks.append(attention.register_forward_pre_hook(tap.catch, with_kwargs=True))
    try:
        yield tap
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Any) -> torch.Tensor:
    """Some layers return a pair."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _mean_over_ranks(scores: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return scores if group.world_size == 1 else group.all_reduce(scores) / group.world_size


def _attention(layer: Any) -> Any:
    from vllm.model_executor.layers.attention import MMEncoderAttention

    return next(module for module in layer.modules() if isinstance(module, MMEncoderAttention))


def _norm(layer: Any) -> Any:
    return next(getattr(layer, name) for name in _NORMS if hasattr(layer, name))
