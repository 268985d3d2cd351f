"""InternVL: tiles of an image are images of their own, 2 x 2 patches a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.families.merged import MergedFamily


class InternVLAdapter(MergedFamily):
    """Tower -> choice per tile -> projector on the kept units.

    ``pixel_values`` do not tell which tiles (or frames) make an image, so each has a budget of its own.
    """

    vision_keys = ("vision_feature_layer", "vision_feature_select_strategy")

    @property
    def unit(self) -> int:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        return int(1 / self.model.config.downsample_ratio)

    def consumed(self, arguments: Mapping[str, Any]) -> int:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        wanted = self._layer(arguments)
        layers = int(self.tower.config.num_hidden_layers)
        if not isinstance(wanted, int) or not -layers <= wanted <= layers or wanted == 0:
            raise ValueError(
                f"vision_feature_layer={wanted!r} must be the output of one of this tower's {layers} layers: "
                f"1..{layers} or -{layers}..-1"
            )
        return wanted % (layers + 1) - 1

    def _layer(self, arguments: Mapping[str, Any]) -> Any:
        wanted = arguments.get("vision_feature_layer")
        return self.model.config.vision_feature_layer if wanted is None else wanted

    def prefix(self, arguments: Mapping[str, Any]) -> int:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        strategy = arguments.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = self.model.config.vision_feature_select_strategy
        if strategy != "default":
            raise ValueError(
                f'vision_feature_select_strategy must be "default" to be pruned; got {strategy!r}: with the '
                "class token, patches make no square"
            )
        return 1

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return [*super().bypassed_methods(), ("model.pixel_shuffle", self.model.model, "pixel_shuffle")]

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings or a configuration that can't be pruned."""
        super().check(settings)
        self.prefix({})

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
        return self.tower.layernorm(hidden) if self._layer(arguments) == -1 else hidden

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        picture = patches.unflatten(1, (self.side, self.side))
        shuffled = self.model.model.pixel_shuffle(picture, scale_factor=self.model.config.downsample_ratio)
        rows: torch.Tensor = self.model.model.multi_modal_projector(shuffled.flatten(1, 2))
        return rows

    def project(self, units: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.multi_modal_projector(units.flatten(2))
        return rows
