"""From an image as the processor cut it to numbers of rows, before and after: the front end counts by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch

from ocvtp.serving.vllm.plan import Plan
from ocvtp.vlm.layouts.packing import placeholders

_CPU = torch.device("cpu")
Run = tuple[int, int]  # rows that follow one another in the unpruned prompt, and how many of them stay


class Counts:
    """Of one engine. ``item`` is what vLLM's processor made of an image."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def check(self) -> None:
        """Raise ``ValueError`` for a model of this family that vLLM runs otherwise than transformers."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """Rows of an image, run by run.

        Args:
            full: rows without pruning.
            item: the image.
        """
        return [(full, self.plan.keep(full))]

    def most(self, full: int) -> int | None:
        """Rows kept of the largest image, which has ``full``; ``None`` if it has to be tried."""
        return self.plan.keep(full)

    def largest(self, info: Any) -> int | None:
        """Rows of the largest image where vLLM does not know; ``None``: let it try."""
        return None


class PictureCounts(Counts):
    """LLaVA-1.5: what the model adds comes on top."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """See :class:`Counts`."""
        return [(full, self._kept(full))]

    def most(self, full: int) -> int:
        """See :class:`Counts`."""
        return self._kept(full)

    def _kept(self, full: int) -> int:
        extra = int(self.plan.layout.prefix({})[1])
        return self.plan.keep(full - extra) + extra


class TileCounts(Counts):
    """LLaVA-NeXT, LLaVA-OneVision."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """See :class:`Counts`."""
        size = [int(side) for side in item["image_sizes"].data]
        (one,) = self.plan.layout.packings([size], {}, _CPU)
        if one.total != full:
            raise RuntimeError(
                f"ocvtp: vLLM counts {full} image tokens for {size[1]} x {size[0]} pixels where ocvtp counts "
                f"{one.total}: please report it"
            )
        newlines = cast(Literal["last", "all"], self.plan.settings.newlines)
        return [(full, placeholders(one, self.plan.keep(len(one.slots)), newlines))]

    def most(self, full: int) -> None:
        """See :class:`Counts`; how many newlines there are depends on the shape."""


class SquareCounts(Counts):
    """Tiles and crops with budgets of their own."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """See :class:`Counts`."""
        tokens = self.plan.layout.tokens
        return [(tokens, self.plan.keep(tokens))] * (full // tokens)

    def most(self, full: int) -> int:
        """See :class:`Counts`."""
        return sum(kept for _, kept in self.runs(full, {}))
