"""Which columns of a batch hold what, on the way from one cut to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ocvtp_kernels._device import on_device


@dataclass(frozen=True)
class Layout:
    """Columns of a batch ``[B, S]`` at some depth, and how many there are of each kind.

    Counts are on the host: they follow from those of the prompt, so nobody waits for a GPU to learn them.

    Attributes:
        columns: int64 column of the prompt, -1 for padding.
        positions: int64, in one dimension.
        live: bool, false on padding.
        vision: bool.
        text: bool, the prompt's text behind the last vision token, where there is one.
        said: bool, of the prompt, without the drafts that assisted generation puts behind it.
        lengths: live columns of each row.
        present: vision tokens of each row.
        words: text of each row.
        left: whether padding is in front.
    """

    columns: torch.Tensor
    positions: torch.Tensor
    live: torch.Tensor
    vision: torch.Tensor
    text: torch.Tensor
    said: torch.Tensor
    lengths: tuple[int, ...]
    present: tuple[int, ...]
    words: tuple[int, ...]
    left: bool

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return all(length == self.live.shape[1] for length in self.lengths)

    @classmethod
    def of_prompt(
        cls, vision: torch.Tensor, live: torch.Tensor | None, positions: torch.Tensor | None, said: int
    ) -> Layout:
        """Of a prompt. Waits for the device once.

        Args:
            vision: ``[B, L]`` bool.
            live: ``[B, L]`` bool; ``None``: no padding.
            positions: ``[B or 1, L]``; ``None``: 0, 1, 2, ...
            said: columns of the prompt; those behind are drafts.
        """
        batch, length = vision.shape
        column = torch.arange(length, device=vision.device).expand(batch, -1)
        whole = torch.ones_like(vision) if live is None else live
        prompt = whole & (column < said)
        last = torch.where(vision, column, -1).amax(1, keepdim=True)
        text = prompt & (column > last) & (last >= 0)
        counts = torch.stack([whole.sum(1), vision.sum(1), text.sum(1), whole[:, -1].long()]).tolist()
        return cls(
            columns=torch.where(whole, column, -1),
            positions=column if positions is None else positions.to(vision.device).expand(batch, -1),
            live=whole,
            vision=vision,
            text=text,
            said=prompt,
            lengths=tuple(counts[0]),
            present=tuple(counts[1]),
            words=tuple(counts[2]),
            left=live is None or all(counts[3]),
        )


def packed(mask: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S]`` bool -> ``[B, n]`` int64 columns, ascending, and ``[B, n]`` bool, false on padding.

    Args:
        mask: of some columns.
        counts: how many there are in each row.
    """
    most = max(counts)
    columns = (~mask).long().sort(dim=1, stable=True).indices[:, :most]
    if min(counts) == most:
        return columns, torch.ones_like(columns, dtype=torch.bool)
    number = on_device(torch.tensor(counts), mask.device)
    return columns, torch.arange(most, device=mask.device)[None] < number[:, None]
