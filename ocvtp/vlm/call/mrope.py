"""Positions in three dimensions, as the Qwen-VL families number text, images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.vlm.call.frame import Frame
from ocvtp.vlm.call.prompt import take
from ocvtp.vlm.contracts.adapter import Adapter


def mrope_positions(
    adapter: Adapter, frame: Frame, index: torch.Tensor, given: Any, arguments: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``[3, B, new]`` of the new short columns, and ``[B, 1]`` of what follows.

    Both are those of the long prompt, whatever stays of it.
    """
    new = frame.ids.shape[1]
    if given is None:
        numbers = adapter.positions(frame.ids, frame.mask, arguments)
        start = _start(adapter, frame, guess=True)
        numbers = numbers + (start if isinstance(start, int) else start.to(numbers.device))
    else:
        shaped = isinstance(given, torch.Tensor) and given.ndim == 3 and given.shape[0] in (3, 4)
        if not shaped or given.shape[1] not in (1, len(frame.ids)) or given.shape[2] < new:
            shape = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(
                f"position_ids of this model must be [3, {len(frame.ids)}, {new}] or [4, ...]; got {shape}"
            )
        numbers = given[-3:, :, -new:].expand(-1, len(frame.ids), -1)
        start = _start(adapter, frame, guess=False)
    return take(numbers, index, 0), _following(numbers, frame.mask, start)


def _following(numbers: torch.Tensor, mask: torch.Tensor | None, start: torch.Tensor | int) -> torch.Tensor:
    """Position ``[B, 1]`` behind the new tokens, from ``numbers`` ``[3, B, new]``: padding doesn't count."""
    highest = numbers.amax(0)
    if mask is None:
        return highest.amax(1, keepdim=True) + 1
    live = mask.to(numbers.device) != 0
    if isinstance(start, torch.Tensor):
        start = start.to(numbers)
    behind = highest.masked_fill(~live, -1).amax(1, keepdim=True) + 1
    return torch.where(live.any(1, keepdim=True), behind, start)  # a row of padding stays where it was


def _start(adapter: Adapter, frame: Frame, *, guess: bool) -> torch.Tensor | int:
    """Position ``[B, 1]`` of the first new token: behind what is cached and not masked.

    Args:
        adapter: of the model.
        frame: of the call.
        guess: whether to ask the model about a cache without a note.

    Raises:
        ValueError: what the model recalls is of another batch.
    """
    prefix = frame.prefix
    if prefix is None or not prefix.foreign:
        start = frame.next_position(original=True)
        if prefix is None or prefix.live is None or frame.cached_mask is None:
            return start
        # A row that ended early was padded by generate, and the next turn masks that padding.
        return start - (prefix.live - frame.cached_mask.long().sum(1, keepdim=True))
    if not guess or (
        frame.before is not None
        and not any(bool((frame.before == adapter.token_id(kind)).any()) for kind in adapter.pixel_keys)
    ):
        return frame.cached_live  # behind text, what the model recalls is some other conversation's
    return frame.cached_live + adapter.recall(len(frame.ids))
