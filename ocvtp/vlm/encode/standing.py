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
from ocvtp_kernels.merge import merge_by, nearest_kept
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
    compared = vision.sources(which)[0] if settings.merge == "features" else vision.projected(which).rows
    device = compared.device
    mask = None if mask is None else mask.to(device)
    owner, mass = nearest_kept(compared.detach(), indices.to(device), mask, backend=settings.backend)
    return Owners(owner, mass)


def stand_for(
    vision: Vision,
    which: Sequence[int],
    indices: torch.Tensor,
    taken: torch.Tensor | None,
    settings: Settings,
) -> list[Piece]:
    """Rows of kept candidates that stand for the dropped ones.

    Args:
        vision: after its tower ran.
        which: segments.
        indices: ``[segments, k]``, ascending.
        taken: rows of the vision's source at ``indices``, if there was one.
        settings: of the call.
    """
    if indices.shape[1] == vision.segments[which[0]].tokens:  # nothing was dropped
        return vision.rows(which, indices, taken)
    found = owners(vision, which, indices, settings)
    mass = found.mass if settings.weigh else None
    if settings.merge == "off":
        made = _kept(vision.projected(which), indices)
        return vision.place(which, indices, made, mass)
    keep = indices.shape[1]
    if settings.merge == "projected":
        every = vision.projected(which)
        rows, *deep = _means((every.rows, *every.deep), found.owner, keep, settings)
        made = Projected(rows, tuple(deep))
    else:
        made = vision.project(which, tuple(_means(vision.sources(which), found.owner, keep, settings)))
    return vision.place(which, indices, made, mass)


def _means(
    each: Sequence[torch.Tensor], owner: torch.Tensor, keep: int, settings: Settings
) -> list[torch.Tensor]:
    return [merge_by(x, owner.to(x.device), keep, backend=settings.backend) for x in each]


def _kept(every: Projected, indices: torch.Tensor) -> Projected:
    rows, *deep = (gather_tokens(each, indices.to(each.device)) for each in (every.rows, *every.deep))
    return Projected(rows, tuple(deep))
