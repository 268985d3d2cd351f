"""What a choice makes of a batch: shorter rows, padded on the prompt's own side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ocvtp.methods.in_llm.contract import Choice
from ocvtp.methods.in_llm.ranking import of_rows
from ocvtp.vlm.in_llm.layout import Layout, packed
from ocvtp_kernels._device import on_device


@dataclass(frozen=True)
class Squeezed:
    """A batch behind a cut.

    Attributes:
        hidden: ``[B, S', D]``.
        layout: of its columns; positions as they were.
        index: ``[B, S']`` int64: the column before the cut whose place each takes.
    """

    hidden: torch.Tensor
    layout: Layout
    index: torch.Tensor


def squeeze(hidden: torch.Tensor, layout: Layout, choice: Choice, kept: tuple[int, ...]) -> Squeezed:
    """Drop columns, and put tokens that were made behind each row's last vision token.

    Args:
        hidden: ``[B, S, D]``.
        layout: of its columns.
        choice: what the method decided.
        kept: how many vision tokens of each row stay.
    """
    batch, length = layout.live.shape
    device = hidden.device
    columns, _ = packed(layout.vision, layout.present)
    stays = torch.zeros_like(layout.vision).scatter(1, columns, choice.kept) & layout.vision
    stays |= layout.live & ~layout.vision
    made = choice.made or (0,) * batch
    lengths = tuple(
        before - present + own + new
        for before, present, own, new in zip(layout.lengths, layout.present, kept, made, strict=True)
    )
    # The place of a token is twice its column: one that is made has the odd number behind the last of vision.
    gone = -1 if layout.left else 4 * length
    place = torch.where(stays, 2 * torch.arange(length, device=device)[None], gone)
    stands = None
    if any(made):
        assert choice.stands is not None
        last = torch.where(layout.vision, torch.arange(length, device=device)[None], -1).amax(1, keepdim=True)
        number = torch.arange(choice.stands.shape[1], device=device)[None]
        there = number < on_device(torch.tensor(made), device)[:, None]
        # Farthest from what stays: old static caches count states that aren't zero, so none fills a row up.
        nowhere = gone - 1 if layout.left else gone + 1
        place = torch.cat([place, torch.where(there, 2 * last + 1, nowhere)], dim=1)
        stands = columns.gather(1, choice.stands)
    order = place.sort(dim=1, stable=True).indices
    size = max(lengths)
    order = order[:, order.shape[1] - size :] if layout.left else order[:, :size]
    index, new = order, hidden
    if stands is not None:
        assert choice.merged is not None
        index = torch.cat([torch.arange(length, device=device).expand(batch, -1), stands], 1).gather(1, order)
        new = torch.cat([hidden, choice.merged.to(hidden.dtype)], dim=1)
    live = _live(lengths, size, layout)
    return Squeezed(
        of_rows(new, order),
        Layout(
            columns=layout.columns.gather(1, index).masked_fill(~live, -1),
            positions=layout.positions.gather(1, index).masked_fill(~live, 0),
            live=live,
            vision=layout.vision.gather(1, index) & live,
            text=layout.text.gather(1, index) & live,
            said=layout.said.gather(1, index) & live,
            lengths=lengths,
            present=tuple(own + new_ones for own, new_ones in zip(kept, made, strict=True)),
            words=layout.words,
            left=layout.left,
        ),
        index,
    )


def renumbered(before: Layout, squeezed: Squeezed) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions without gaps from each row's first on, and by how much its last has come down.

    Args:
        before: the layout before the cut.
        squeezed: what became of it.

    Returns:
        ``[B, S']`` int64, 0 on padding, and ``[B]`` int64.
    """
    live = squeezed.layout.live
    columns = torch.arange(live.shape[1], device=live.device)[None]
    first = torch.where(live, columns, live.shape[1]).amin(1, keepdim=True)
    last = torch.where(live, columns, -1).amax(1, keepdim=True)
    old = before.positions.gather(1, squeezed.index)
    begin = old.gather(1, first)
    fresh = (begin + columns - first).masked_fill(~live, 0)
    shift = old.gather(1, last) - (begin + last - first)
    return fresh, shift[:, 0]


def at_columns(table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows of cosines or sines ``[..., B or 1, S, d]`` at ``columns`` ``[B, R]``: ``[..., B, R, d]``."""
    front = table.shape[:-3]
    where = columns.to(table.device, non_blocking=True)
    where = where.view(*(1,) * len(front), *columns.shape, 1).expand(*front, *columns.shape, table.shape[-1])
    return table.expand(*front, columns.shape[0], *table.shape[-2:]).gather(-2, where)


def _live(lengths: tuple[int, ...], size: int, layout: Layout) -> torch.Tensor:
    """``[B, size]`` bool: which columns of rows of these lengths are no padding."""
    device = layout.live.device
    if min(lengths) == size:
        return torch.ones(len(lengths), size, dtype=torch.bool, device=device)
    count = on_device(torch.tensor(lengths), device)[:, None]
    columns = torch.arange(size, device=device)[None]
    return columns >= size - count if layout.left else columns < count
