"""Pictures of one size whose tokens are square units of patches.

What InternVL, Idefics3, SmolVLM, Gemma 3 and PaliGemma have in common: every picture (an image, or a tile or
crop of one, which the prompt alone relates) is chosen from by itself; its tokens are units of ``unit x unit``
patches in raster order; the language model consumes the end of the tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from ocvtp.vlm.contracts.layout import CPU, Layout, TowerFacts, first
from ocvtp.vlm.contracts.rows import Segment
from ocvtp.vlm.contracts.settings import Settings


class SquareLayout(Layout):
    """PaliGemma, and what the others say otherwise."""

    @property
    def side(self) -> int:
        """Patches along the side of a picture."""
        return first(self.vision.image_size) // first(self.vision.patch_size)

    @property
    def unit(self) -> int:
        """Patches along the side of a token."""
        return 1

    @property
    def tokens(self) -> int:
        """Candidates of a picture."""
        return (self.side // self.unit) ** 2

    def facts(
        self, arguments: Mapping[str, Any], *, attention: str = "", device: torch.device = CPU
    ) -> TowerFacts:
        """See :class:`~ocvtp.vlm.contracts.layout.Layout`."""
        return TowerFacts(
            tower=self.vision.model_type,
            width=self.vision.hidden_size,
            unit=self.unit,
            num_layers=self.vision.num_hidden_layers,
            consumed_layers=(self.consumed(arguments),),
            tokens=self.tokens,
            extra_rows=0,
            attention=attention,
            device=device,
        )

    def segments(self, pictures: Sequence[int]) -> list[Segment]:
        """Every picture is chosen from by itself.

        Args:
            pictures: how many each item has.
        """
        across = self.side // self.unit
        return [
            Segment(item, self.tokens, (across, across))
            for item, count in enumerate(pictures)
            for _ in range(count)
        ]

    def consumed(self, arguments: Mapping[str, Any]) -> int:
        """The layer whose output the model consumes."""
        return int(self.vision.num_hidden_layers) - 1

    def prefix(self, arguments: Mapping[str, Any]) -> int:
        """Tokens before the first patch."""
        return 0


class Gemma3Layout(SquareLayout):
    """Gemma 3: tokens are averages of patches."""

    @property
    def unit(self) -> int:
        """See :class:`SquareLayout`."""
        return self.side // math.isqrt(int(self.config.mm_tokens_per_image))


class Idefics3Layout(SquareLayout):
    """Idefics3 and SmolVLM."""

    @property
    def unit(self) -> int:
        """See :class:`SquareLayout`."""
        return int(self.config.scale_factor)


class InternVLLayout(SquareLayout):
    """InternVL in transformers' format: a class token comes first."""

    @property
    def unit(self) -> int:
        """See :class:`SquareLayout`."""
        return int(1 / self.config.downsample_ratio)

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings or a configuration that can't be pruned."""
        super().check(settings)
        self.prefix({})

    def layer(self, arguments: Mapping[str, Any]) -> Any:
        """The layer that is asked for, as upstream counts."""
        wanted = arguments.get("vision_feature_layer")
        return self.config.vision_feature_layer if wanted is None else wanted

    def consumed(self, arguments: Mapping[str, Any]) -> int:
        """See :class:`SquareLayout`."""
        wanted = self.layer(arguments)
        layers = int(self.vision.num_hidden_layers)
        if not isinstance(wanted, int) or not -layers <= wanted <= layers or wanted == 0:
            raise ValueError(
                f"vision_feature_layer={wanted!r} must be the output of one of this tower's {layers} layers: "
                f"1..{layers} or -{layers}..-1"
            )
        return wanted % (layers + 1) - 1

    def prefix(self, arguments: Mapping[str, Any]) -> int:
        """See :class:`SquareLayout`."""
        strategy = arguments.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = self.config.vision_feature_select_strategy
        if strategy != "default":
            raise ValueError(
                f'vision_feature_select_strategy must be "default" to be pruned; got {strategy!r}: with the '
                "class token, patches make no square"
            )
        return 1


def grouped(patches: torch.Tensor, side: int, unit: int) -> torch.Tensor:
    """``[pictures, side * side, C] -> [pictures, units, unit * unit, C]``."""
    blocks = patches.unflatten(1, (side // unit, unit, side // unit, unit))
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@lru_cache(maxsize=32)
def members(side: int, unit: int) -> torch.Tensor:
    """``[units, unit * unit]``: the patches of each unit, both in raster order."""
    with torch.inference_mode(False):  # what is made in it could never be used for training
        patches = torch.arange(side * side).view(side // unit, unit, side // unit, unit)
        return patches.transpose(1, 2).reshape((side // unit) ** 2, unit * unit)
