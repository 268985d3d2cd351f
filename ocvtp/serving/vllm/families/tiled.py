"""LLaVA-NeXT and LLaVA-OneVision: images packed from tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ocvtp.serving.vllm.counts import TileCounts
from ocvtp.serving.vllm.model import Pruned, batches
from ocvtp.serving.vllm.visions import Tiles
from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.rows import Segment
from ocvtp.vlm.layouts.packing import Packing


class PrunedTiles(Pruned):
    """LLaVA-NeXT and LLaVA-OneVision."""

    counts_class = TileCounts

    def _packings(self, image_input: Any) -> list[Packing]:
        sizes = image_input["image_sizes"].tolist()
        packings: list[Packing] = self.plan.layout.packings(sizes, {}, torch.device("cpu"))
        return packings

    def parts(self, image_input: Any) -> Iterator[dict[str, Any]]:
        """See :class:`Pruned`; tiles that only pad the batch are not encoded."""
        packings, pixels = self._packings(image_input), image_input["pixel_values"]
        for start, stop in batches([one.total for one in packings], self._most):
            numbers = range(start, stop)
            yield {
                "type": "pixel_values",
                "pixel_values": [pixels[i][: packings[i].tiles] for i in numbers],
                "image_sizes": image_input["image_sizes"][start:stop],
            }

    def vision(self, part: Any, encode: Callable[[], Any]) -> Vision:
        """See :class:`Pruned`."""
        packings, device = self._packings(part), part["pixel_values"][0].device
        segments = [Segment(i, len(one.slots)) for i, one in enumerate(packings)]
        totals = [one.total for one in packings]
        common = (self.usual_tower(), encode, segments, totals, device)
        prefix, _ = self.plan.layout.prefix({})
        packings = [one.to(device) for one in packings]
        return Tiles(*common, packings=packings, newlines=self.plan.settings.newlines, prefix=prefix)
