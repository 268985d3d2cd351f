"""Qwen-VL: images and videos of any size, tokens of merged patches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.contracts.errors import UnsupportedModelError
from ocvtp.vlm.contracts.layout import CPU, Layout, TowerFacts
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.rows import Segment
from ocvtp.vlm.contracts.settings import Frames, Settings
from ocvtp.vlm.layouts.qwen_geometry import Grid

#: ``model_type`` of the towers, which newer releases end in ``_vision``.
QWEN_TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class Cut:
    """What the images or videos of a call are chosen from.

    Attributes:
        segments: an image, a frame of a video, or a whole one.
        offsets: where each segment begins in its item.
        totals: tokens of each item.
    """

    segments: list[Segment]
    offsets: list[int]
    totals: list[int]


class UnitLayout(Layout):
    """Candidates are the merged units in raster order, whatever order the tower computes in."""

    options = frozenset({"frames"})

    def __init__(self, config: Any, vision: Any = None) -> None:
        super().__init__(config, vision)
        kind = self.vision.model_type
        if kind.removesuffix("_vision") not in QWEN_TOWERS:
            raise UnsupportedModelError(
                f"can't prune a {config.model_type} model with a {kind!r} vision tower; "
                f"supported: {', '.join(QWEN_TOWERS)}"
            )

    @property
    def unit(self) -> int:
        """Patches along the side of a token."""
        return int(self.vision.spatial_merge_size)

    def facts(
        self, arguments: Mapping[str, Any], *, attention: str = "", device: torch.device = CPU
    ) -> TowerFacts:
        """See :class:`~ocvtp.vlm.contracts.layout.Layout`."""
        # In Qwen2-VL's configuration, hidden_size is the language model's.
        width = getattr(self.vision, "embed_dim", None) or self.vision.hidden_size
        depth = int(self.vision.depth)
        return TowerFacts(
            tower=self.vision.model_type,
            width=int(width),
            unit=self.unit,
            num_layers=depth,
            consumed_layers=(depth - 1,),
            tokens=None,
            extra_rows=0,
            attention=attention,
            device=device,
        )

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that this family or this tower can't serve."""
        super().check(settings)
        selector = settings.selector
        if not isinstance(selector, Reducer) and selector.reads_scores and self.scored is None:
            raise ValueError(
                "no block of this tower attends to whole images, so there are no scores to fill the budget "
                'by; choose "farthest_point", "random" or "grid"'
            )

    @property
    def scored(self) -> int | None:
        """The last block in which patches attend to their whole frame; ``None`` if there is none."""
        return scored_block(self.vision, int(self.vision.depth))

    def cut(self, grids: Sequence[Grid], frames: Frames) -> Cut:
        """Segments of items of these grids; with ``frames="each"`` every frame of a video is one."""
        segments: list[Segment] = []
        offsets: list[int] = []
        totals = []
        for item, (length, height, width) in enumerate(grids):
            rows, columns = height // self.unit, width // self.unit
            each = frames == "each" or length == 1
            count, shape = (length, (rows, columns)) if each else (1, (length * rows, columns))
            tokens = shape[0] * shape[1]
            segments += [Segment(item, tokens, shape)] * count
            offsets += [tokens * i for i in range(count)]
            totals.append(length * rows * columns)
        return Cut(segments, offsets, totals)


def full_blocks(vision: Any) -> Collection[int] | None:
    """Blocks in which patches attend to their whole frame; ``None`` is all of them.

    Args:
        vision: a tower, or its configuration.
    """
    blocks: Collection[int] | None = getattr(vision, "fullatt_block_indexes", None)
    return blocks


def scored_block(vision: Any, depth: int) -> int | None:
    """The last of :func:`full_blocks` of ``depth`` blocks; ``None`` if there is none."""
    full = full_blocks(vision)
    return depth - 1 if full is None else max(full, default=None)


def window_units(vision: Any) -> int | None:
    """Units along the side of an attention window; ``None`` if all attention is full.

    Args:
        vision: a tower, or its configuration.
    """
    if full_blocks(vision) is None:
        return None
    return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)
