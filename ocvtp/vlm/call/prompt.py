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
from typing import NamedTuple

import torch


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
    ids: torch.Tensor, dropping: Sequence[Placeholders], mask: torch.Tensor | None, *, trailing: bool
) -> Squeezed:
    """Drop the placeholders whose rows were pruned, and padding; pad again to a rectangle, on the left.

    Args:
        ids: ``[B, S]`` token ids.
        dropping: per modality, what stays.
        mask: ``[B, S]``, 0 for padding, or ``None``.
        trailing: whether padding at a row's end stays there. Then columns counted from the end are the same
            columns as before, up to the first that is dropped in any row. Elsewhere padding is dropped.

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
        stays.index_fill_(0, some.places, True)  # assigning a number makes a GPU wait
        keep = keep.masked_scatter(where, stays)
        anywhere |= where
        counts.append(where.sum(1))
    if torch.compiler.is_compiling():
        return _squeezed_alike(keep, counts, dropping)
    # A masked placeholder still receives its feature row upstream, so it stays a column as well.
    blank = None if mask is None else ~(mask.bool() | anywhere)
    live = keep if blank is None else keep & ~blank
    length = live.sum(1)
    if blank is not None and trailing:
        behind = ~_from_here(~keep).any(0)  # every row is as before there
        spare = blank & (behind | ~_from_here(~blank))
        sizes = [length, (blank & behind).sum(1), spare.sum(1)]
    else:
        spare, sizes = None, [length]
    found = torch.stack([*sizes, *counts]).tolist()  # the one synchronisation here
    for some, row_counts in zip(dropping, found[len(sizes) :], strict=True):
        check_placeholders(row_counts, some.totals)
    lengths = found[0]
    width = max(lengths)
    if spare is not None:
        width = max(map(sum, zip(lengths, found[1], strict=True)))
        # Padding at the end, from the right, as far as a row has room for it.
        live = live | spare & (spare.flip(1).cumsum(1).flip(1) <= width - length[:, None])
        length = live.sum(1)
        lengths = [n + min(more, width - n) for n, more in zip(lengths, found[2], strict=True)]
    # A stable sort moves the live columns to the front in order.
    order = torch.sort((~live).to(torch.uint8), dim=1, stable=True).indices[:, :width]
    if min(lengths) == width:
        return Squeezed(order, padded=False)
    column = torch.arange(width, device=ids.device)[None]
    gap = width - length[:, None]
    order = torch.gather(order, 1, (column - gap) % width)
    return Squeezed(torch.where(column >= gap, order, -1), padded=True)


def _squeezed_alike(
    keep: torch.Tensor, counts: Sequence[torch.Tensor], dropping: Sequence[Placeholders]
) -> Squeezed:
    """The columns of ``keep`` ``[B, S]``, if every row keeps as many; checked when the graph runs."""
    dropped, rows = sum(sum(some.totals) - len(some.places) for some in dropping), len(keep)
    fits = torch.stack([count.sum() == sum(some.totals) for count, some in zip(counts, dropping)]).all()  # noqa: B905
    width = keep.shape[1] - dropped // rows
    torch._assert_async(
        fits & (keep.sum(1) == width).all(),
        "a traced call needs the placeholders of whole images, and as many pruned ones in every row",
    )
    order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices
    return Squeezed(order[:, :width], padded=False)


def _from_here(flags: torch.Tensor) -> torch.Tensor:
    """Whether there is a flag in a column or behind it, ``[B, S] -> [B, S]``."""
    return flags.flip(1).cumsum(1).flip(1) > 0


def check_rows(where: torch.Tensor, totals: Sequence[int]) -> None:
    """:func:`check_placeholders` of placeholders ``[B, S]`` bool; while something traces, of their number."""
    if torch.compiler.is_compiling():
        torch._assert_async(where.sum() == sum(totals), "the prompt has other placeholders than the images")
    else:
        check_placeholders(where.sum(1).tolist(), totals)


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


def short_columns(index: torch.Tensor, long: int) -> torch.Tensor:
    """Short column of every long one, ``[B, short] -> [B, long]`` int64; -1 for those that were dropped."""
    short = torch.arange(index.shape[1], device=index.device).expand_as(index)
    found = index.new_full((index.shape[0], long + 1), -1)
    return found.scatter_(1, index.masked_fill(index < 0, long), short)[:, :long]


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
    found = short_columns(index[:1], long)[0][wanted.to(index.device) % long]
    if bool((found < 0).any()):
        raise ValueError("logits_to_keep asks for the logits of a pruned image token or of padding")
    return found


def restore_prompt(sequences: torch.Tensor, long: torch.Tensor, short_length: int) -> torch.Tensor:
    """Put the long prompt back: ``[B * n, short + new] -> [B * n, long + new]``."""
    copies = sequences.shape[0] // long.shape[0]
    prompt = long.repeat_interleave(copies, 0).to(sequences.device)
    return torch.cat([prompt, sequences[:, short_length:]], dim=1)
