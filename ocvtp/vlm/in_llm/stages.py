"""How the sequence looks from one cut on, and what of it lies on a cache for later calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

_ATTRIBUTE = "_ocvtp_inside"


@dataclass(frozen=True)
class Stage:
    """The prompt from one cut on.

    Attributes:
        cut: 0-based layer before which it begins.
        columns: ``[B, S]`` int64 column of the prompt behind each; that of a dropped token for one that was
            made; -1 for padding.
        positions: ``[B, S]`` int64.
        live: ``[B, S]`` bool, false on padding.
        full: whether there is no padding.
        shift: ``[B]`` int64, by how much positions of later tokens are lower; ``None``: they are not.
    """

    cut: int
    columns: torch.Tensor
    positions: torch.Tensor
    live: torch.Tensor
    full: bool
    shift: torch.Tensor | None

    def without(self, tokens: int) -> Stage:
        """Without so many at the end."""
        if not tokens:
            return self
        parts = {name: getattr(self, name)[:, :-tokens] for name in ("columns", "positions", "live")}
        return replace(self, **parts)

    def of(self, batch: int) -> Stage:
        """Of ``batch`` rows, each prompt's one after another."""
        copies = batch // len(self.live)
        if copies == 1:
            return self
        parts = {
            name: getattr(self, name).repeat_interleave(copies, 0)
            for name in ("columns", "positions", "live")
        }
        shift = None if self.shift is None else self.shift.repeat_interleave(copies, 0)
        return replace(self, **parts, shift=shift)


@dataclass(frozen=True)
class Trace:
    """What lies on a cache whose layers hold different numbers of tokens.

    Attributes:
        stages: by cut, ascending.
        prompt: columns that the first layers hold of the prompt.
    """

    stages: tuple[Stage, ...]
    prompt: int

    def behind(self, cache: Any, past: int, batch: int) -> Trace:
        """The same for a call on ``batch`` rows and ``past`` cached columns.

        Fewer than the prompt had are what assisted generation makes of its first call, which has drafts
        behind the prompt.

        Raises:
            ValueError: rows that prompts can't be repeated to, or a cache that was cropped so that its layers
                don't go together any more.
        """
        rows = len(self.stages[0].live)
        if batch % rows:
            raise ValueError(
                f"the cache holds {rows} prompts with tokens dropped inside the language model, and the call "
                f"has {batch} rows"
            )
        over = max(0, self.prompt - past)
        stages = tuple(stage.without(over).of(batch) for stage in self.stages)
        found = Trace(stages, self.prompt - over)
        for stage in stages:
            held = _held(cache, stage.cut)
            if held is not None and held != stage.live.shape[1] + past - found.prompt:
                raise ValueError(
                    f"layer {stage.cut} of this cache holds {held} tokens where {stage.live.shape[1]} of the "
                    f"prompt and {past - found.prompt} behind it were left by a call that dropped tokens "
                    "inside the language model: it was cropped to a length that its layers don't share, as "
                    "assisted generation of older transformers does. Continue with the cache as it came"
                )
        return found


def trace_of(cache: Any) -> Trace | None:
    """What lies on a cache, if anything does."""
    found: Trace | None = getattr(cache, _ATTRIBUTE, None)
    return found


def leave(cache: Any, trace: Trace | None) -> None:
    """Put a trace on a cache, or take one off."""
    if cache is None:
        return
    if trace is not None:
        setattr(cache, _ATTRIBUTE, trace)
    elif hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def _held(cache: Any, layer: int) -> int | None:
    """Tokens in a layer of a growing cache; ``None`` where it doesn't say, or where that waits for a GPU."""
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if layer >= len(layers) or getattr(cache, "is_compileable", False):
        return None
    held = layers[layer].get_seq_length()
    return held if isinstance(held, int) else None
