"""What a rival method makes of the pictures of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from ocvtp.selection import Reduction, Selection
from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.evidence import Telling
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.rows import Piece, Projected
from ocvtp.vlm.contracts.selector import Group
from ocvtp.vlm.contracts.settings import Settings


def reduced(
    vision: Vision, reducer: Reducer, group: Group, questions: Sequence[torch.Tensor] | None
) -> Selection:
    """What is left of a group of segments; of methods that merge with ``reduction``.

    Args:
        vision: after its tower ran, unless the method runs it.
        reducer: the method.
        group: fewer tokens are to be kept than there are.
        questions: ids of the text that asks about each image or video of the call, if known.

    Raises:
        ValueError: a budget that leaves tiles without a token.
    """
    keep = group.keep
    assert isinstance(keep, int)
    # Who is bound to a model gives only what that model's family can tell.
    evidence = cast(Telling, vision).evidence(group.which)
    asked = None if questions is None else [questions[vision.segments[i].item] for i in group.which]
    tiles = 1 if reducer.pooled else evidence.tiles
    if keep < tiles:
        raise ValueError(
            f"{reducer.title} gives each of an image's {tiles} tiles its share of {keep} tokens, which is "
            f"none: keep at least {tiles}"
        )
    made = reducer.reduce(evidence, keep // tiles, asked)
    if isinstance(made, Selection):
        indices = _counted_on(made.indices, tiles, group.tokens)
        return Selection(indices, indices.new_zeros(len(indices)), tokens=group.tokens)
    return _placed(reducer.arranged(_joined(made, tiles, group.tokens), evidence))


def handed_over(
    vision: Vision, which: Sequence[int], reduction: Reduction, settings: Settings, *, projects: bool
) -> Sequence[Piece]:
    """Rows of a method that merges, in its own order where positions are renumbered.

    Args:
        vision: after its tower ran.
        which: segments.
        reduction: of them.
        settings: of the call.
        projects: whether the rows have yet to go through the projector.
    """
    if settings.positions == "original":
        reduction = reduction.by_place()
    made = vision.project(which, (reduction.rows,)) if projects else Projected(reduction.rows)
    return vision.place(which, reduction.slots.sort(1).values, made, None)


def _joined(made: Reduction, tiles: int, tokens: int) -> Reduction:
    """Of pictures, to segments of ``tiles`` of them, one after another."""
    count = made.slots.shape[1]
    owner = torch.where(made.owner < 0, made.owner, made.owner + _tile(made.owner, tiles) * count)
    return Reduction(
        made.rows.unflatten(0, (-1, tiles)).flatten(1, 2),
        _counted_on(made.slots, tiles, tokens),
        owner.unflatten(0, (-1, tiles)).flatten(1),
        tokens,
    )


def _placed(reduction: Reduction) -> Selection:
    """Which places rows take, and of how many tokens each is."""
    placed = reduction.by_place()
    mass = torch.zeros(placed.slots.shape, dtype=torch.float32, device=placed.slots.device)
    mass.scatter_add_(1, placed.owner.clamp(min=0), (placed.owner >= 0).to(mass.dtype))
    none = placed.slots.new_zeros(len(placed.slots))
    return Selection(
        placed.slots, none, tokens=placed.tokens, mass=mass, owner=placed.owner, reduction=reduction
    )


def _counted_on(indices: torch.Tensor, tiles: int, tokens: int) -> torch.Tensor:
    """``[segments * tiles, k]`` within a tile ``-> [segments, tiles * k]`` within a segment."""
    moved = indices + _tile(indices, tiles) * (tokens // tiles)
    return moved.unflatten(0, (-1, tiles)).flatten(1)


def _tile(like: torch.Tensor, tiles: int) -> torch.Tensor:
    """``[segments * tiles, 1]``: number of each tile in its segment."""
    return torch.arange(tiles, device=like.device).repeat(len(like) // tiles)[:, None]
