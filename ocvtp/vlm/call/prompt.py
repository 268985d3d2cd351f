"""Pure tensor arithmetic on prompts: which columns stay, and how to take them.

The *long* sequence is the one the processor made; the *short* one is what the language model sees. One index
tensor ``[B, short]`` describes the relation: the long column behind every short one, or -1 for padding.
Models scatter image features with ``masked_scatter``: the i-th placeholder in row-major order receives the
i-th feature row, so one boolean per placeholder says everything, however many images a row has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Side = Literal["left", "right"]


def take(tensor: torch.Tensor, index: torch.Tensor, fill: int) -> torch.Tensor:
    """Columns ``index`` ``[B, n]`` of ``tensor`` ``[..., B, long]``; ``fill`` where the index is -1."""
    columns = index.clamp(min=0).expand(*tensor.shape[:-2], -1, -1)
    return torch.gather(tensor, -1, columns).masked_fill(index < 0, fill)


def identity(batch: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The index of unchanged columns ``start..stop``, ``[batch, stop - start]``."""
    return torch.arange(start, stop, device=device).expand(batch, -1)


class Squeezed(NamedTuple):
    """Columns that stay, moved together.

    Attributes:
        columns: ``[B, n]`` long column of every short one, -1 for padding.
        padded: whether there is any padding.
    """

    columns: torch.Tensor
    padded: bool


@dataclass(frozen=True)
class Placeholders:
    """The placeholders of one modality, and which of them stay.

    Attributes:
        token_id: the placeholder.
        totals: how many each image or video has.
        places: ``[kept]`` which of all of them stay, counted in row-major order.
    """

    token_id: int
    totals: tuple[int, ...]
    places: torch.Tensor


def squeeze(
    ids: torch.Tensor, dropping: Sequence[Placeholders], mask: torch.Tensor | None, side: Side
) -> Squeezed:
    """Drop the placeholders whose rows were pruned, and the padding; pad again to a rectangle.

    Args:
        ids: ``[B, S]`` token ids.
        dropping: per modality, what stays.
        mask: ``[B, S]``, 0 for padding, or ``None``.
        side: where to pad.

    Raises:
        ValueError: the placeholders in ``ids`` don't belong to these images.
    """
    keep = torch.ones_like(ids, dtype=torch.bool)
    anywhere = torch.zeros_like(keep)
    counts = []
    for some in dropping:
        where = ids == some.token_id
        # Padded to the size of ids, so that a wrong number of placeholders reaches the check below.
        size = max(where.numel(), sum(some.totals))
        stays = torch.zeros(size, dtype=torch.bool, device=ids.device)
        stays[some.places] = True
        keep = keep.masked_scatter(where, stays)
        anywhere |= where
        counts.append(where.sum(1))
    # A masked placeholder still receives its feature row upstream, so it stays a column as well.
    live = keep if mask is None else keep & (mask.bool() | anywhere)
    lengths, *per_row = torch.stack([live.sum(1), *counts]).tolist()  # the one synchronisation here
    for some, row_counts in zip(dropping, per_row, strict=True):
        check_placeholders(row_counts, some.totals)
    width = max(lengths)
    # A stable sort moves the live columns to the front in order.
    order = torch.sort((~live).to(torch.uint8), dim=1, stable=True).indices[:, :width]
    if min(lengths) == width:
        return Squeezed(order, padded=False)
    column = torch.arange(width, device=ids.device)[None]
    length = live.sum(1, keepdim=True)
    if side == "left":
        order = torch.gather(order, 1, (column - (width - length)) % width)
        valid = column >= width - length
    else:
        valid = column < length
    return Squeezed(torch.where(valid, order, -1), padded=True)


def check_placeholders(per_row: Sequence[int], totals: Sequence[int]) -> None:
    """Raise ``ValueError`` unless every row holds the placeholders of whole images, all of them in order."""
    ends = set(itertools.accumulate(totals, initial=0))
    reached = list(itertools.accumulate(per_row))
    if reached[-1] == sum(totals) and ends.issuperset(reached):
        return
    one = set(totals)
    each = f"{len(totals)} of {one.pop()} tokens each" if len(one) == 1 else f"of {list(totals)} tokens"
    raise ValueError(
        f"the prompt has {list(per_row)} placeholders per row, but the images or videos, {each}, need "
        f"{sum(totals)} in all, those of whole ones in every row; use the model's processor, don't truncate, "
        "and behind a cache pass the pixels of the new turn alone"
    )


def running_positions(mask: torch.Tensor, start: torch.Tensor | int = 0) -> torch.Tensor:
    """Positions that skip padding, as ``generate`` numbers them: ``[B, S] -> [B, S]``, 0 on padding."""
    steps = mask.long().cumsum(-1) - 1
    return (steps + start).masked_fill(mask == 0, 0)


def remap_kept_logits(wanted: torch.Tensor, index: torch.Tensor, long: int) -> torch.Tensor:
    """Short columns for a tensor ``logits_to_keep`` that counts long ones.

    Args:
        wanted: 1-D, integer columns (negative ones count from the end) or a bool mask over the columns.
        index: ``[B, short]`` long column of every short one.
        long: number of long columns.

    Raises:
        ValueError: rows keep different columns, or a wanted column was pruned.
    """
    if not bool((index == index[:1]).all()):
        raise ValueError(
            "a tensor logits_to_keep needs the same columns in every row, but this batch keeps different "
            "ones per row; run row by row, or pass an int"
        )
    if wanted.dtype == torch.bool:
        wanted = wanted.nonzero()[:, 0]
    short_of = torch.full((long,), -1, dtype=torch.long, device=index.device)
    kept = index[0] >= 0
    short_of[index[0][kept]] = kept.nonzero()[:, 0]
    found = short_of[wanted.to(index.device) % long]
    if bool((found < 0).any()):
        raise ValueError("logits_to_keep asks for the logits of a pruned image token or of padding")
    return found


def restore_prompt(sequences: torch.Tensor, long: torch.Tensor, short_length: int) -> torch.Tensor:
    """Put the long prompt back: ``[B * n, short + new] -> [B * n, long + new]``."""
    copies = sequences.shape[0] // long.shape[0]
    prompt = long.repeat_interleave(copies, 0).to(sequences.device)
    return torch.cat([prompt, sequences[:, short_length:]], dim=1)
