"""Idefics3 and SmolVLM: tiles of an image are images of their own, merged by pixel shuffling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.contracts.versions import transformers_older_than
from ocvtp.vlm.contracts.weights import inside
from ocvtp.vlm.families.merged import MergedFamily


class Idefics3Adapter(MergedFamily):
    """Tower -> choice per tile -> connector on the kept units.

    ``pixel_values`` do not tell which tiles make an image, so each has a budget of its own. Tiles of zeros
    only fill up the batch, and upstream leaves them out as well.
    """

    vision_keys = ("pixel_attention_mask",)
    tower_name = "vision_model"

    @property
    def stacked(self) -> bool:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        return transformers_older_than("5.21")

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        connector = self.model.model.connector
        return [
            *super().bypassed_methods(),
            ("model.connector.forward", connector, "forward"),
            ("model.connector.pixel_shuffle", connector, "pixel_shuffle"),
        ]

    def pictures(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Real tiles of ``pixel_values`` ``[prompts, most tiles, 3, H, W]``.

        Raises:
            ValueError: other shapes, no real tile, or tiles that are padded themselves.
        """
        pixels, mask = arguments["pixel_values"], arguments.get("pixel_attention_mask")
        if pixels.ndim != 5:
            raise ValueError(f"pixel_values must be [prompts, tiles, 3, H, W]; got {list(pixels.shape)}")
        flat = pixels.flatten(0, 1).to(dtype=self.model.dtype)
        real = (flat != 0).flatten(1).any(1)
        if torch.compiler.is_compiling():  # how many are real has to be known
            whole = real.all() if mask is None else real.all() & mask.all()
            torch._assert_async(
                whole, "a traced call takes no tiles that only fill up a batch, nor padded ones"
            )
            return flat
        fits = torch.ones_like(real)
        if mask is not None:
            fits = (mask.flatten(0, 1) != 0).flatten(1).all(1).to(real.device) | ~real
        # The one wait here: how many tiles are real decides how many rows there are.
        here, unpadded = torch.stack([real, fits]).tolist()
        if not any(here):
            raise ValueError(
                "pixel_values are nothing but tiles of zeros, which only fill up a batch: leave them out of "
                "a call without images"
            )
        if not all(unpadded):
            raise ValueError(
                "pixel_attention_mask marks padding inside a tile, whose tokens can't be chosen among: "
                "resize images as the model's processor does"
            )
        return some_of(flat, [tile for tile, there in enumerate(here) if there]).contiguous()

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        side = self.layout.side
        every = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
        hidden: torch.Tensor = self.tower.embeddings(pixel_values=pixels, patch_attention_mask=every)
        return hidden

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.connector(patches)
        return rows

    def project(self, units: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        connector = self.model.model.connector
        rows: torch.Tensor = inside((connector,), connector.modality_projection, units.flatten(2))
        return rows
