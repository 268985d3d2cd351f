"""Pure tensor arithmetic on prompts: which columns stay, and how to take them.

The *long* sequence is the one the processor made; the *short* one is what the language model sees. One index
tensor ``[B, short]`` describes the relation: the long column behind every short one, or -1 for padding.
Models scatter image features with ``masked_scatter``: the i-th placeholder in row-major order receives the
i-th feature row, so one boolean per placeholder says everything, however many images a row has.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Side = Literal["left", "right"]


def take(tensor: torch.Tensor, index: torch.Tensor, fill: int) -> torch.Tensor:
    """Columns ``index`` ``[B, n]`` of ``tensor`` ``[B, long]``; ``fill`` where the index is -1."""
    return torch.gather(tensor, 1, index.clamp(min=0)).masked_fill(index < 0, fill)


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


def squeeze(
    ids: torch.Tensor,
    image_token_id: int,
    slots: torch.Tensor,
    total: int,
    mask: torch.Tensor | None,
    side: Side,
) -> Squeezed:
    """Drop the placeholders whose rows were pruned, and the padding; pad again to a rectangle.

    Args:
        ids: ``[B, S]`` token ids.
        image_token_id: the placeholder.
        slots: ``[images, kept]`` placeholders of its image that each kept row belongs to.
        total: placeholders per image.
        mask: ``[B, S]``, 0 for padding, or ``None``.
        side: where to pad.

    Raises:
        ValueError: the placeholders in ``ids`` don't belong to this many images.
    """
    where = ids == image_token_id
    slots = slots.to(ids.device)
    offsets = torch.arange(slots.shape[0], device=ids.device)[:, None] * total
    # Padded to the size of ids, so that a wrong number of placeholders reaches the check below.
    stays = torch.zeros(max(where.numel(), slots.shape[0] * total), dtype=torch.bool, device=ids.device)
    stays[(offsets + slots).flatten()] = True
    keep = torch.ones_like(where).masked_scatter(where, stays)
    # A masked placeholder still receives its feature row upstream, so it stays a column as well.
    live = keep if mask is None else keep & (mask.bool() | where)
    placeholders, lengths = torch.stack([where.sum(1), live.sum(1)]).tolist()  # the one synchronisation
    check_placeholders(placeholders, slots.shape[0], total)
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


def check_placeholders(per_row: list[int], images: int, total: int) -> None:
    """Raise ``ValueError`` unless the rows hold the placeholders of whole images, ``images`` in all."""
    if sum(per_row) == images * total and not any(count % total for count in per_row):
        return
    raise ValueError(
        f"the prompt has {per_row} image placeholders per row, but {images} image(s) of {total} tokens each "
        f"need {images * total} in all, a multiple of {total} in every row; use the model's processor, and "
        "don't truncate"
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
