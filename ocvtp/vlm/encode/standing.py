"""Kept tokens that stand for the others: whose token is whose, and the mean that a kept one carries.

Attention over n equal tokens is attention over one of them with log n added to its logit. So a kept token
that stands for m tokens carries their mean, and the language model adds log m
(:mod:`ocvtp.vlm.call.weighing`), as ToMe's proportional attention does in vision transformers (arXiv
2210.09461, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.rows import Piece, Projected
from ocvtp.vlm.contracts.settings import Settings
from ocvtp_kernels.merge import merge_by, merge_tokens, nearest_kept
from ocvtp_kernels.selection import gather_tokens


@dataclass(frozen=True)
class Owners:
    """Which kept token each candidate belongs to.

    Attributes:
        owner: ``[segments, N]`` int64, a position among the kept.
        mass: ``[segments, k]`` float32, how many candidates each kept token stands for.
    """

    owner: torch.Tensor
    mass: torch.Tensor


def owners(
    vision: Vision,
    which: Sequence[int],
    indices: torch.Tensor,
    settings: Settings,
    mask: torch.Tensor | None = None,
) -> Owners:
    """The nearest kept token of each candidate, by what the language model reads of them.

    With ``merge="features"`` by what the projector reads: projecting all is what that option spares.

    Args:
        vision: after its tower ran.
        which: segments.
        indices: ``[segments, k]``.
        settings: of the call.
        mask: ``[segments, k]`` bool, false where an index only repeats the last one.
    """
    return _nearest(_candidates(vision, which, settings)[0], indices, settings, mask)


def stand_for(
    vision: Vision,
    which: Sequence[int],
    indices: torch.Tensor,
    settings: Settings,
) -> list[Piece]:
    """Rows of kept candidates that stand for the dropped ones.

    Args:
        vision: after its tower ran.
        which: segments.
        indices: ``[segments, k]``, ascending.
        settings: of the call.
    """
    if indices.shape[1] == vision.segments[which[0]].tokens:  # nothing was dropped
        return vision.rows(which, indices, None)
    every = _candidates(vision, which, settings)  # once: a projector may run for it
    keep, backend = indices.shape[1], settings.backend
    if settings.merge == "off":
        mass = _nearest(every[0], indices, settings).mass
        kept = tuple(gather_tokens(each, indices.to(each.device)) for each in every)
    else:
        first, *deep = every
        rows, mass, owner = merge_tokens(first, indices.to(first.device), backend=backend)
        kept = (rows, *(merge_by(each, owner.to(each.device), keep, backend=backend) for each in deep))
    made = vision.project(which, kept) if settings.merge == "features" else Projected(kept[0], kept[1:])
    return vision.place(which, indices, made, mass if settings.weigh else None)


def _candidates(vision: Vision, which: Sequence[int], settings: Settings) -> tuple[torch.Tensor, ...]:
    """``[segments, N, C]``: what the projector reads of all with ``merge="features"``, or else what the
    language model reads; then the same of DeepStack layers.
    """
    if settings.merge == "features":
        return vision.sources(which)
    rows, deep = vision.projected(which)
    return (rows, *deep)


def _nearest(
    compared: torch.Tensor, indices: torch.Tensor, settings: Settings, mask: torch.Tensor | None = None
) -> Owners:
    mask = None if mask is None else mask.to(compared.device)
    kept = indices.to(compared.device)
    return Owners(*nearest_kept(compared, kept, mask, backend=settings.backend))
