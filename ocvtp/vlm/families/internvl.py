"""InternVL: tiles of an image are images of their own, 2 x 2 patches a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.families.merged import MergedFamily


class InternVLAdapter(MergedFamily):
    """Tower -> choice per tile -> projector on the kept units.

    ``pixel_values`` do not tell which tiles (or frames) make an image, so each has a budget of its own.
    """

    vision_keys = ("vision_feature_layer", "vision_feature_select_strategy")

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return [*super().bypassed_methods(), ("model.pixel_shuffle", self.model.model, "pixel_shuffle")]

    def pictures(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        pixels: torch.Tensor = arguments["pixel_values"]
        return pixels.to(dtype=self.model.dtype)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        out = self.tower.embeddings(pixels)
        return out[0] if isinstance(out, tuple) else out

    def layers(self) -> Sequence[Any]:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        layers: Sequence[Any] = self.tower.encoder.layer
        return layers

    def run_layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        out = layer(hidden)
        return out[0] if isinstance(out, tuple) else out

    def attention(self, layer: Any) -> Any:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        return layer.attention

    def query_key(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        attention, x = layer.attention, layer.layernorm_before(hidden)
        return attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))

    def norm(self, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        return self.tower.layernorm(hidden) if self.layout.layer(arguments) == -1 else hidden

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        picture = patches.unflatten(1, (self.layout.side, self.layout.side))
        shuffled = self.model.model.pixel_shuffle(picture, scale_factor=self.model.config.downsample_ratio)
        rows: torch.Tensor = self.model.model.multi_modal_projector(shuffled.flatten(1, 2))
        return rows

    def project(self, units: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.multi_modal_projector(units.flatten(2))
        return rows
