"""LLaVA-NeXT and LLaVA-OneVision: an image is a small whole picture and tiles of it, chosen from together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.layout import CPU, TowerFacts
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.layouts.packing import Packing, packing, whole_picture
from ocvtp.vlm.layouts.pictures import PictureLayout


class TileLayout(PictureLayout):
    """LLaVA-NeXT."""

    options = frozenset({"layout", "newlines", "tower"})

    def facts(
        self, arguments: Mapping[str, Any], *, attention: str = "", device: torch.device = CPU
    ) -> TowerFacts:
        """See :class:`~ocvtp.vlm.contracts.layout.Layout`; images differ in size."""
        of_a_tile = super().facts(arguments, attention=attention, device=device)
        return dataclasses.replace(of_a_tile, tokens=None, extra_rows=0)

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that contradict each other, or features that make no picture."""
        super().check(settings)
        self.check_square({})
        if settings.layout == "official":
            if settings.positions == "original":
                raise ValueError(
                    'layout="official" keeps padding, which has no position in the long prompt: use '
                    'positions="compact"'
                )
            if settings.newlines != "last":
                raise ValueError('layout="official" has one newline, the last')

    def check_square(self, arguments: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless the features of a tile are its patches, all and nothing else."""
        patches, class_rows = self.patches(arguments), self.prefix(arguments)[1]
        if class_rows or math.isqrt(patches) ** 2 != patches:
            raise ValueError(
                "tiles can be packed if all patches and nothing else are features of the tower; this "
                f"vision_feature_select_strategy leaves {patches + class_rows} of each tile"
            )

    def packings(
        self, sizes: Sequence[Sequence[int]], arguments: Mapping[str, Any], device: torch.device
    ) -> list[Packing]:
        """How images of these ``(height, width)`` are packed."""
        return [self._packing(int(h), int(w), device) for h, w in sizes]

    def _packing(self, height: int, width: int, device: torch.device, most: int | None = None) -> Packing:
        grids = tuple((int(h), int(w)) for h, w in self.config.image_grid_pinpoints)
        return packing(height, width, grids, int(self.vision.image_size), self.side, most).to(device)


class OnevisionLayout(TileLayout):
    """LLaVA-OneVision. A prompt of several images has them uncut."""

    options = frozenset({"newlines", "frames"})

    def packings(
        self, sizes: Sequence[Sequence[int]], arguments: Mapping[str, Any], device: torch.device
    ) -> list[Packing]:
        """See :class:`TileLayout`."""
        ratio = arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        most = int(str(ratio).rpartition("_")[2])
        cut = [True] * len(sizes)
        if arguments.get("batch_num_images") is not None:
            counts = arguments["batch_num_images"]
            counts = counts.tolist() if isinstance(counts, torch.Tensor) else [int(one) for one in counts]
            cut = [count == 1 for count in counts for _ in range(count)]
        if len(cut) != len(sizes):
            raise ValueError(f"batch_num_images counts {len(cut)} images, image_sizes has {len(sizes)}")
        return [
            self._packing(int(h), int(w), device, most) if cut[i] else whole_picture(self.side).to(device)
            for i, (h, w) in enumerate(sizes)
        ]
