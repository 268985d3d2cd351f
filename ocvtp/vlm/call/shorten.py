"""From the arguments of one call to those of the same call on the pruned prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.call.asking import asking_of
from ocvtp.vlm.call.documents import documents_of, mask_of, text_positions
from ocvtp.vlm.call.frame import Frame, frame_of
from ocvtp.vlm.call.handover import hand_over
from ocvtp.vlm.call.memory import CacheNote
from ocvtp.vlm.call.mrope import mrope_positions
from ocvtp.vlm.call.prompt import (
    Placeholders,
    check_rows,
    identity,
    remap_kept_logits,
    running_positions,
    squeeze,
    take,
)
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.pixels import pixels_in
from ocvtp.vlm.contracts.rows import KeptRows
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.encode.encode import encode
from ocvtp.vlm.encode.timing import Clock

# Tensors along the sequence, and what to put on new padding.
_SEQUENCES = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}

# They describe the long sequence in ways that can't be shortened by taking columns.
_UNSUPPORTED = (
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "max_length_k",
    "max_length_q",
    "seq_idx",
    "shift_labels",
)


@dataclass(frozen=True)
class ShortCall:
    """The call to make.

    Attributes:
        ids: ``[B, short]``: the whole prompt in ``generate``, the new tokens in ``forward``.
        arguments: everything else.
        note: what the cache will hold once the prompt is in it; ``None`` if no column changed.
        index: ``[B, short]`` column of the caller's ids behind every one of ``ids``, -1 for padding.
    """

    ids: torch.Tensor
    arguments: dict[str, Any]
    note: CacheNote | None
    index: torch.Tensor


def shorten(
    adapter: Adapter,
    settings: Settings,
    ids: torch.Tensor,
    arguments: Mapping[str, Any],
    prefix: CacheNote | None,
    clock: Clock | None,
    *,
    generating: bool,
    pad_token_id: int,
    guard: bool = False,
    calling: Sequence[Any] = (),
    worded: bool = True,
) -> ShortCall:
    """Encode the images, drop the columns of pruned tokens, hand the kept rows over.

    Args:
        adapter: of the model.
        settings: of the call.
        ids: ``[B, S]``: the whole conversation in ``generate``, the tokens after the cache in ``forward``.
        arguments: all the others.
        prefix: what the cache holds.
        clock: times the stages, if one runs.
        generating: ``generate`` rather than ``forward``.
        pad_token_id: for new padding.
        guard: put one column of padding in front of every row where positions have gaps. ``generate`` drops
            an attention mask of ones, and without mask and cache transformers takes gaps for packed
            sequences.
        calling: modules whose calls are under way, which is none in ``generate``.
        worded: whether ``ids`` are of words, and not only of what embeddings can be told to be.

    Raises:
        ValueError: arguments that don't fit together, or that have no meaning on a pruned prompt.
    """
    for name in _UNSUPPORTED:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} can't be combined with token pruning")
    if prefix is not None and prefix.packed:
        raise ValueError("this cache holds several documents packed into one row: nothing can follow them")
    _check_alike(settings, prefix)
    frame = frame_of(ids, arguments.get("attention_mask"), prefix, generating=generating)
    if pixels_in(adapter, arguments):
        adapter.check_call(arguments, generating=generating)
    asking = asking_of(adapter, settings, frame, arguments, worded=worded)
    kept = encode(adapter, arguments, settings, clock, calling=calling, asking=asking)
    consumed = {*adapter.pixel_keys.values(), *adapter.vision_keys} if kept else set()
    short = {name: value for name, value in arguments.items() if name not in consumed}

    index, padded = _new_index(adapter, frame, kept, generating=generating)
    if kept and not torch.compiler.is_compiling():
        settings.watch.look()  # how long rows are was waited for: what was found in images is there, too
    same = all(rows.complete for rows in kept.values()) and (prefix is None or not prefix.pruned)
    if same and not adapter.mrope:
        if kept:
            hand_over(short, adapter, settings, ids, kept, frame.long_start if generating else 0, calling)
        return ShortCall(ids, short, None, identity(ids.shape[0], 0, ids.shape[1], ids.device))

    shift = 0 if generating else adapter.first_position
    given = short.get("position_ids")
    if shift and given is not None:
        given = given - shift
    positions, following = None, None
    if adapter.mrope:
        positions, following = mrope_positions(adapter, frame, index, given, arguments)
    else:
        positions = _positions(settings, frame, index, given, ids, generating=generating)
    text = text_positions(adapter, frame, given)
    packed, apart = None if same else documents_of(adapter, frame, text, arguments), None
    if packed is not None:
        _check_packed(adapter, arguments, prefix, generating=generating)
        packed = packed.short(index)
        text = packed.renumbered()
        if not adapter.mrope:
            text = positions = text if positions is None or settings.positions == "compact" else positions
        types = short.get("token_type_ids")
        types = None if types is None else take(_like_ids("token_type_ids", types, ids), index, 0)
        apart = mask_of(adapter, packed, text, types)
    long = frame.long_start + frame.ids.shape[1]
    whole = index if prefix is None else torch.cat([prefix.index, _shift(index, prefix.long)], dim=1)
    mask = _short_mask(frame, index)
    bias = _bias(adapter, frame, index, kept)
    if guard and positions is not None and prefix is None and not adapter.mrope:
        whole, mask, positions = (
            torch.nn.functional.pad(tensor, (1, 0), value=value)
            for tensor, value in ((whole, -1), (mask, 0), (positions, 0))
        )
        bias = None if bias is None else torch.nn.functional.pad(bias, (1, 0))
        padded = True

    columns = whole if generating else index
    short_ids = take(ids, columns, pad_token_id)
    for name, fill in _SEQUENCES.items():
        if short.get(name) is not None:
            short[name] = take(_like_ids(name, short[name], ids), columns, fill)
    if short.get("labels") is not None:  # nobody predicts the first column, also not padding in front of it
        short["labels"] = short["labels"].masked_fill(columns == 0, -100)
    wanted = short.get("logits_to_keep")
    if isinstance(wanted, torch.Tensor):
        if generating:
            raise ValueError("a tensor logits_to_keep has no meaning in generate; pass an int")
        short["logits_to_keep"] = remap_kept_logits(wanted, index, ids.shape[1])
    if following is None:
        following = _following(positions, whole, given, prefix, generating=generating)
    else:
        assert positions is not None
        adapter.remember(following, mask)
        # The first row, if there is one, counts the short prompt: transformers reads documents from it.
        if generating:
            text = running_positions(mask)[:, -index.shape[1] :]
        if text is not None and (generating or same or packed is not None):
            positions = torch.cat([text[None], positions])
    if positions is not None:
        if generating and prefix is not None:  # sliced off by generate; only the new ones count
            positions = torch.nn.functional.pad(positions, (prefix.index.shape[1], 0))
        short["position_ids"] = positions + shift if shift else positions
    has_mask = arguments.get("attention_mask") is not None
    # A mask also says that gaps in the positions are no boundaries of packed sequences.
    gaps = positions is not None and not (adapter.mrope and same)
    short["attention_mask"] = mask if has_mask or padded or gaps or prefix is not None else None
    if packed is not None:
        short["attention_mask"] = apart
    if kept:
        start = prefix.index.shape[1] if generating and prefix is not None else 0
        hand_over(short, adapter, settings, short_ids, kept, start, calling)
    live = mask.sum(1, keepdim=True) if adapter.mrope else None
    note = CacheNote(whole, long, following, pruned=not same, live=live, packed=packed is not None, bias=bias)
    return ShortCall(short_ids, short, note, columns)


def _check_alike(settings: Settings, prefix: CacheNote | None) -> None:
    """Raise ``ValueError`` for a cache that the language model read with other weights than it will now."""
    if prefix is None or not prefix.pruned or (prefix.bias is not None) == settings.weigh:
        return
    before, now = ("with", "without") if prefix.bias is not None else ("without", "with")
    raise ValueError(
        f"this cache was filled {before} weights for kept tokens that stand for others, and can't be "
        f"continued {now} them: apply(..., weigh={prefix.bias is not None}), or start with an empty cache"
    )


def _bias(
    adapter: Adapter, frame: Frame, index: torch.Tensor, kept: Mapping[str, KeptRows]
) -> torch.Tensor | None:
    """``[B, cached + new]`` float32: log of how many tokens a short column stands for; ``None``: one each."""
    prefix = frame.prefix
    before = None if prefix is None else prefix.bias
    if before is None and all(rows.mass is None for rows in kept.values()):
        return None
    new = torch.zeros(index.shape, dtype=torch.float32, device=index.device)
    if kept:
        ids = take(frame.ids, index, -1)
        for modality, rows in kept.items():
            if rows.mass is not None:
                where = ids == adapter.token_id(modality)
                new = new.masked_scatter(where, rows.mass.log().to(new.device))
    if prefix is None:
        return new
    if before is None:
        before = torch.zeros(prefix.index.shape, dtype=torch.float32, device=new.device)
    return torch.cat([before, new], dim=1)


def _following(
    positions: torch.Tensor | None,
    whole: torch.Tensor,
    given: Any,
    prefix: CacheNote | None,
    *,
    generating: bool,
) -> torch.Tensor | None:
    """Position ``[B, 1]`` of the token that will follow; ``None`` where ``generate`` counts the mask."""
    if generating and given is None and (prefix is None or prefix.next_position is None):
        return None
    if positions is None:
        return torch.full((whole.shape[0], 1), whole.shape[1], device=whole.device)
    return positions.amax(1, keepdim=True) + 1


def _new_index(
    adapter: Adapter, frame: Frame, kept: Mapping[str, KeptRows], *, generating: bool
) -> tuple[torch.Tensor, bool]:
    """Columns of the new tokens that stay, and whether padding was added."""
    ids = frame.ids
    unchanged = identity(ids.shape[0], 0, ids.shape[1], ids.device)
    if not kept:
        return unchanged, False
    if all(rows.complete for rows in kept.values()):
        for modality, rows in kept.items():
            check_rows(ids == adapter.token_id(modality), rows.totals)
        return unchanged, False
    dropping = [
        Placeholders(adapter.token_id(modality), rows.totals, rows.places(ids.device))
        for modality, rows in kept.items()
    ]
    squeezed = squeeze(ids, dropping, frame.mask, trailing=not generating)
    return squeezed.columns, squeezed.padded


def _positions(
    settings: Settings,
    frame: Frame,
    index: torch.Tensor,
    given: Any,
    ids: torch.Tensor,
    *,
    generating: bool,
) -> torch.Tensor | None:
    """Positions of the new short columns ``[B, new]``; ``None`` if the model numbers them rightly itself."""
    prefix, original = frame.prefix, settings.positions == "original"
    ones = torch.ones_like(frame.ids) if frame.mask is None else frame.mask
    if given is not None:
        numbers = _like_ids("position_ids", given, ids)[:, -frame.ids.shape[1] :]
    elif prefix is None and not original:
        return None
    elif prefix is not None and not original:
        if generating and prefix.next_position is None:  # generate counts the mask, as it did before
            return None
        short_mask = take(ones, index, 0)
        return running_positions(short_mask, frame.next_position(original=False))
    elif generating or prefix is not None:
        numbers = running_positions(ones, frame.next_position(original=True))
    else:  # forward counts columns, padding or not
        numbers = identity(ids.shape[0], 0, ids.shape[1], ids.device)
    _refuse_flash_with_cache(settings, prefix)
    return take(numbers, index, 0)


def _check_packed(
    adapter: Adapter, arguments: Mapping[str, Any], prefix: CacheNote | None, *, generating: bool
) -> None:
    """Raise ``ValueError`` where several documents in a row have no meaning."""
    if generating:
        raise ValueError(
            "position_ids start over within a row, which says that it holds several documents: generate "
            "can't go on with them; pass them as rows of their own"
        )
    if prefix is not None:
        raise ValueError(
            "position_ids start over within a row, which says that it holds several documents: they can't "
            "follow what a cache holds; pass them without past_key_values"
        )
    adapter.check_packed(arguments)


def _refuse_flash_with_cache(settings: Settings, prefix: CacheNote | None) -> None:
    if prefix is not None and "flash" in settings.attention:
        raise ValueError(
            "flash attention reads gaps in position_ids as packed sequences, which is wrong behind a "
            'non-empty cache; use positions="compact", or another attention implementation'
        )


def _short_mask(frame: Frame, index: torch.Tensor) -> torch.Tensor:
    """``[B, cached + new]`` over the short columns."""
    new = (index >= 0).long() if frame.mask is None else take(frame.mask, index, 0)
    if frame.prefix is None:
        return new
    cached = frame.cached_mask
    if cached is None:
        cached = frame.prefix.index >= 0
    return torch.cat([cached.to(new.dtype), new], dim=1)


def _shift(index: torch.Tensor, by: int) -> torch.Tensor:
    return torch.where(index < 0, index, index + by)


def _like_ids(name: str, tensor: Any, ids: torch.Tensor) -> torch.Tensor:
    """``tensor`` as ``[B, S]``, or ``ValueError``."""
    fits = isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == ids.shape[1]
    if not fits or tensor.shape[0] not in (1, ids.shape[0]):
        shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} must have the shape of input_ids {list(ids.shape)} to be pruned; got {shape}"
        )
    return tensor.expand(ids.shape[0], -1)
