"""What ``custom_generate`` functions return: sequences in most cases, but nobody holds them to it."""

from __future__ import annotations

from typing import Any

import torch


def prompt_in(sequences: Any, prompt: torch.Tensor) -> int | None:
    """The column at which all ``sequences`` go on with their prompt; ``None`` if there is none.

    Args:
        sequences: what was returned. Some functions pad it on the left.
        prompt: ``[B, S]`` token ids they were given.
    """
    if not isinstance(sequences, torch.Tensor) or sequences.ndim != 2 or len(sequences) % len(prompt):
        return None
    wanted = prompt.repeat_interleave(len(sequences) // len(prompt), 0).to(sequences.device)
    length = prompt.shape[1]
    starts = range(sequences.shape[1] - length + 1)
    return next(
        (start for start in starts if torch.equal(sequences[:, start : start + length], wanted)), None
    )
