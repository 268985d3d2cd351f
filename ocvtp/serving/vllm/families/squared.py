"""Families whose pictures have one size and are chosen from one by one: tiles, crops, or whole images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ocvtp.serving.vllm.counts import SquareCounts
from ocvtp.serving.vllm.model import Pruned, batches
from ocvtp.serving.vllm.taps import Tower
from ocvtp.serving.vllm.visions import Squares
from ocvtp.vlm.contracts.adapter import Vision


class PrunedSquares(Pruned):
    """Pictures of all images in one tensor, and how many each image has."""

    counts_class = SquareCounts
    #: What vLLM calls the pictures.
    pixels_key = "pixel_values"
    #: Further tensors with one row per picture.
    beside: tuple[str, ...] = ()

    def tower(self) -> Tower:
        """The vision tower."""
        return self.usual_tower()

    def pictures(self, image_input: Any) -> Sequence[int]:
        """How many each image has."""
        return [int(count) for count in image_input["num_patches"]]

    def parts(self, image_input: Any) -> Iterator[dict[str, Any]]:
        """See :class:`Pruned`."""
        counts = self.pictures(image_input)
        by_row = {
            name: image_input[name].split(list(counts))
            for name in (self.pixels_key, *self.beside)
            if image_input.get(name) is not None
        }
        for start, stop in batches([count * self.plan.layout.tokens for count in counts], self._most):
            yield {
                "type": "pixel_values",
                "num_patches": torch.tensor(counts[start:stop]),
                **{name: torch.cat(rows[start:stop]) for name, rows in by_row.items()},
            }

    def vision(self, part: Any, encode: Callable[[], Any]) -> Vision:
        """See :class:`Pruned`."""
        layout, counts = self.plan.layout, self.pictures(part)
        totals = [count * layout.tokens for count in counts]
        device = part[self.pixels_key].device
        common = (self.tower(), encode, layout.segments(counts), totals, device)
        return Squares(*common, side=layout.side, unit=layout.unit, prefix=layout.prefix({}))
