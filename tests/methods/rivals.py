"""Every published method on one set of seeded inputs, in one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from ocvtp import Selection, methods
from ocvtp.selection import Reduction

TOKENS = 64
SHAPE = (8, 8)


@dataclass(frozen=True)
class Inputs:
    """What a tower leaves of a batch of images, ``[B, ...]`` each."""

    features: torch.Tensor  # [B, 1 + N, C]
    row: torch.Tensor  # [B, N]
    other_row: torch.Tensor  # [B, N]
    keys: torch.Tensor  # [B, 1 + N, d]
    projected: torch.Tensor  # [B, N, D]
    image_embeds: torch.Tensor  # [B, N, P]
    text: torch.Tensor  # [B, P]

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        return Inputs(*(change(getattr(self, field.name)) for field in fields(self)))

    def images(self, which: list[int]) -> Inputs:
        return self.each(lambda x: x[which])

    def but(self, **tensors: torch.Tensor) -> Inputs:
        return replace(self, **tensors)


def inputs(batch: int = 3, tokens: int = TOKENS, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return Inputs(
        normal(1 + tokens, 24),
        normal(tokens).softmax(dim=1),
        normal(tokens).softmax(dim=1),
        normal(1 + tokens, 8),
        normal(tokens, 40),
        normal(tokens, 12),
        normal(12),
    )


Choose = Callable[[Inputs, int], Selection]
Merge = Callable[[Inputs, int], Reduction]


def _visionzip(x: Inputs, keep: int) -> Reduction:
    contextual = max(1, keep // 6)
    return methods.visionzip(x.features, x.row, x.keys, keep - contextual, contextual)


def _visionzip_merged(x: Inputs, keep: int) -> Reduction:
    contextual = max(1, keep // 6)
    patches, keys = x.features[:, 1:], x.keys[:, 1:]
    return methods.visionzip_merged(patches, x.row, keys, keep - contextual, contextual)


def _prumerge(spread: float) -> Merge:
    return lambda x, keep: methods.prumerge(
        x.features[:, 1:], x.row, x.keys[:, 1:], keep, spread=spread, neighbours=9
    )


CHOOSING: dict[str, Choose] = {
    "hiprune": lambda x, keep: methods.hiprune(x.row, x.other_row, keep, shape=SHAPE, alpha=0.5),
    "vispruner": lambda x, keep: methods.vispruner(x.features[:, 1:], x.row, keep),
    "divprune": lambda x, keep: methods.divprune(x.projected, keep),
    "cdpruner": lambda x, keep: methods.cdpruner(x.projected, x.row, keep),
}
MERGING: dict[str, Merge] = {
    "trim": lambda x, keep: methods.trim(x.features[:, 1:], x.image_embeds, x.text, keep),
    "visionzip": _visionzip,
    "visionzip_merged": _visionzip_merged,
    "prumerge": _prumerge(0.0),
    "prumerge+": _prumerge(0.75),
    "tome_post": lambda x, keep: methods.tome_post(x.features[:, 1:], keep),
}
ALL: dict[str, Callable[[Inputs, int], Selection | Reduction]] = {**CHOOSING, **MERGING}

#: Public names beside them, and where they are tested.
OTHERS = {
    "TiledChoice": "globalcom2_odd",
    "cdpruner_order": "cdpruner_odd",
    "divprune_order": "divprune_odd",
    "globalcom2": "globalcom2_odd",
    "one_head_row": "prumerge_odd",
    "prumerge_published": "prumerge_odd",
    "relevance_of": "cdpruner_odd",
    "trim_budget": "trim_odd",
    "trim_scores": "trim_odd",
    "visionzip_tiles": "visionzip_odd",
    "vispruner_order": "vispruner_odd",
}


def tensors(result: Selection | Reduction) -> tuple[torch.Tensor, ...]:
    if isinstance(result, Selection):
        return (result.indices,)
    return result.rows, result.slots, result.owner
