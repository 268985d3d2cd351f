"""What a call brings: the long sequence, seen from the cache it goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.call.memory import CacheNote
from ocvtp.vlm.call.prompt import take


@dataclass(frozen=True)
class Frame:
    """The long sequence: what is cached, then what is new."""

    ids: torch.Tensor  # [B, new]
    mask: torch.Tensor | None  # [B, new]
    cached_mask: torch.Tensor | None  # [B, cached] on the short columns
    cached_live: torch.Tensor | int  # [B, 1] live long columns behind the cache
    prefix: CacheNote | None
    before: torch.Tensor | None = None  # [B, cached] long ids behind the cache, where they are passed again

    @property
    def long_start(self) -> int:
        """Long column of the first new token."""
        return 0 if self.prefix is None else self.prefix.long

    def next_position(self, *, original: bool) -> torch.Tensor | int:
        """Position of the first new token."""
        if self.prefix is None:
            return 0
        if self.prefix.next_position is not None:
            return self.prefix.next_position
        if original:
            return self.cached_live
        if self.cached_mask is not None:
            return self.cached_mask.long().sum(1, keepdim=True)
        return (self.prefix.index >= 0).sum(1, keepdim=True)


def frame_of(ids: torch.Tensor, mask: Any, prefix: CacheNote | None, *, generating: bool) -> Frame:
    """The frame of one call.

    Args:
        ids: ``[B, S]``: the whole conversation in ``generate``, the tokens after the cache in ``forward``.
        mask: ``attention_mask`` of the call, over cached (long or, in ``forward``, short) and new columns.
        prefix: what the cache holds.
        generating: ``generate`` rather than ``forward``.

    Raises:
        ValueError: a mask or a conversation that doesn't fit the cache.
    """
    batch = ids.shape[0]
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise ValueError("token pruning needs a 2-D attention_mask: other kinds can't be shortened")
    if prefix is None:
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}; they must agree"
            )
        return Frame(ids, mask, None, 0, None)
    new = ids
    if generating:
        if ids.shape[1] <= prefix.long:
            raise ValueError(
                f"the cache holds {prefix.long} tokens of the conversation and input_ids has {ids.shape[1]}: "
                "pass the whole conversation, followed by something new"
            )
        new = ids[:, prefix.long :]
    seen = ids[:, : prefix.long] if generating else None
    if mask is None:
        return Frame(new, None, None, prefix.long, prefix, seen)
    cached, fresh = prefix.index.shape[1], new.shape[1]
    if mask.shape == (batch, prefix.long + fresh):
        before = mask[:, : prefix.long]
        live = before.long().sum(1, keepdim=True)
        return Frame(new, mask[:, prefix.long :], take(before, prefix.index, 0), live, prefix, seen)
    if not generating and mask.shape == (batch, cached + fresh):  # the caller counts short columns
        before = mask[:, :cached]
        live = prefix.long - cached + before.long().sum(1, keepdim=True)
        return Frame(new, mask[:, cached:], before, live, prefix)
    raise ValueError(
        f"attention_mask has shape {list(mask.shape)}; the cache holds {prefix.long} tokens of the "
        f"conversation and {fresh} follow, so it must be [{batch}, {prefix.long + fresh}]"
    )
