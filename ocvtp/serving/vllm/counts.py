"""From an image as the processor cut it to numbers of rows, before and after: the front end counts by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from ocvtp.serving.vllm.plan import Plan
from ocvtp.vlm.contracts.layout import CPU
from ocvtp.vlm.layouts.packing import placeholders

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

    def most(self, full: int | None, info: Any) -> int | None:
        """Rows that vLLM has to expect of an image; ``None``: it may find out by trying its largest.

        Args:
            full: of the largest one without pruning, where vLLM knows it.
            info: vLLM's, of the model.
        """
        return None


class PictureCounts(Counts):
    """LLaVA-1.5: what the model adds comes on top."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """See :class:`Counts`."""
        return [(full, self._kept(full))]

    def _kept(self, full: int) -> int:
        extra = int(self.plan.layout.prefix({})[1])
        return self.plan.keep(full - extra) + extra


class TileCounts(Counts):
    """LLaVA-NeXT, LLaVA-OneVision."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """See :class:`Counts`."""
        size = [int(side) for side in item["image_sizes"].data]
        (one,) = self.plan.layout.packings([size], {}, CPU)
        if one.total != full:
            raise RuntimeError(
                f"ocvtp: vLLM counts {full} image tokens for {size[1]} x {size[0]} pixels where ocvtp counts "
                f"{one.total}: please report it"
            )
        newlines = cast(Literal["last", "all"], self.plan.settings.newlines)
        return [(full, placeholders(one, self.plan.keep(len(one.slots)), newlines))]

    def most(self, full: int | None, info: Any) -> int:
        """See :class:`Counts`.

        The largest image is not the one with most rows: one that has few candidates keeps all its newlines.
        """
        layout, side = self.plan.layout, int(self.plan.layout.side)
        tile = int(layout.vision.image_size)
        grids = [
            (int(h) // tile * side, int(w) // tile * side) for h, w in layout.config.image_grid_pinpoints
        ]
        lines = max(rows for rows, _ in grids)
        return self.plan.keep(side**2 + max(rows * columns for rows, columns in grids)) + lines


class OnevisionCounts(TileCounts):
    """LLaVA-OneVision."""

    def check(self) -> None:
        """See :class:`Counts`."""
        ratio = self.plan.layout.config.vision_aspect_ratio
        if ratio != "anyres_max_9":
            raise ValueError(
                f"vLLM packs images of LLaVA-OneVision as anyres_max_9, and this model's vision_aspect_ratio "
                f"is {ratio!r}"
            )


class UnitCounts(Counts):
    """Qwen-VL: images of any size."""

    def most(self, full: int | None, info: Any) -> int | None:
        """See :class:`Counts`; as without pruning.

        The kept number, which may be the same for a thumbnail and for 16 megapixels, would have vLLM try a
        batch of a hundred of the largest when it starts.
        """
        return full


class SquareCounts(Counts):
    """Tiles and crops with budgets of their own."""

    def runs(self, full: int, item: Mapping[str, Any]) -> list[Run]:
        """See :class:`Counts`."""
        tokens = self.plan.layout.tokens
        return [(tokens, self.plan.keep(tokens))] * (full // tokens)
