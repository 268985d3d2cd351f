"""The text that asks about a picture, as the language model's ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

#: Placeholder, and how many of them each image or video has -> the question about each.
Asking = Callable[[int, Sequence[int]], list[torch.Tensor]]


def questions_of(
    ids: torch.Tensor, said: torch.Tensor, token_id: int, totals: Sequence[int]
) -> list[torch.Tensor]:
    """What follows the last picture of the row that a picture is in, or what stands before, if nothing does.

    Waits for the device: only for methods that read text.

    Args:
        ids: ``[B, S]`` of the prompt.
        said: ``[B, S]`` bool, true for words: not for padding, placeholders and answers.
        token_id: the placeholder.
        totals: placeholders of each image or video, in row-major order.

    Returns:
        One int64 tensor of ids per image or video, on the CPU.
    """
    ids = ids.cpu()
    live = said.cpu()
    pictured = ids == token_id
    texts = []
    for row, there, here in zip(ids, live, pictured, strict=True):
        behind = here.flip(0).cumsum(0).flip(0) == 0
        asked = row[there & behind]
        texts.append(asked if len(asked) else row[there & ~here])
    ends = list(itertools.accumulate(pictured.sum(1).tolist()))
    rows, seen, row = [], 0, 0
    for total in totals:
        seen += total
        while row + 1 < len(ends) and ends[row] < seen:
            row += 1
        rows.append(row)
    return [texts[row] for row in rows]
