"""LLaVA-1.5: a CLIP or SigLIP tower sees pictures of one size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.vlm.contracts.errors import UnsupportedModelError
from ocvtp.vlm.contracts.layout import CPU, Layout, TowerFacts
from ocvtp.vlm.contracts.rows import Segment

#: ``model_type`` of a tower -> whether its first token is a class token.
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}


class PictureLayout(Layout):
    """Candidates are the patch tokens.

    With ``vision_feature_select_strategy="default"`` the first token of a tower is dropped, as upstream does:
    CLIP's class token, or SigLIP's first patch. With ``"full"`` CLIP's class token is always kept and does
    not count against the budget.
    """

    options = frozenset({"tower"})

    def __init__(self, config: Any, vision: Any = None) -> None:
        super().__init__(config, vision)
        kind = self.vision.model_type
        if kind not in TOWERS:
            raise UnsupportedModelError(
                f"can't prune a {config.model_type} model with a {kind!r} vision tower; "
                f"supported: {', '.join(sorted(TOWERS))}"
            )

    def facts(
        self, arguments: Mapping[str, Any], *, attention: str = "", device: torch.device = CPU
    ) -> TowerFacts:
        """See :class:`~ocvtp.vlm.contracts.layout.Layout`.

        Raises:
            ValueError: a feature layer or select strategy that the tower does not have.
        """
        return TowerFacts(
            tower=self.vision.model_type,
            width=self.vision.hidden_size,
            num_layers=self.vision.num_hidden_layers,
            consumed_layers=self.consumed(arguments),
            tokens=self.patches(arguments),
            extra_rows=self.prefix(arguments)[1],
            attention=attention,
            device=device,
        )

    @property
    def class_token(self) -> bool:
        """Whether the first token of the tower is one."""
        return TOWERS[self.vision.model_type]

    @property
    def side(self) -> int:
        """Patches along the side of a picture."""
        return int(self.vision.image_size) // int(self.vision.patch_size)

    def patches(self, arguments: Mapping[str, Any]) -> int:
        """Candidates of a picture."""
        return self.side**2 + self.class_token - self.prefix(arguments)[0]

    def shape(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """Rows and columns of the candidates, if all patches are."""
        patches = self.patches(arguments)
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else None

    def segments(self, count: int, arguments: Mapping[str, Any]) -> list[Segment]:
        """Every one of ``count`` pictures is an image of its own."""
        tokens, shape = self.patches(arguments), self.shape(arguments)
        return [Segment(i, tokens, shape) for i in range(count)]

    def consumed(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Layers the projector reads, in its order; ``hidden_states[i + 1]`` is the output of layer ``i``."""
        wanted = arguments.get("vision_feature_layer")
        if wanted is None:
            wanted = self.config.vision_feature_layer
        layers = self.vision.num_hidden_layers
        consumed = []
        for index in [wanted] if isinstance(wanted, int) else list(wanted):
            if not -layers <= index <= layers or index == 0:
                raise ValueError(
                    f"vision_feature_layer={wanted!r} needs outputs of encoder layers; this tower has "
                    f"{layers} layers, so indices are 1..{layers} or -{layers}..-1"
                )
            consumed.append(index % (layers + 1) - 1)
        return tuple(consumed)

    def prefix(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens before the first candidate, and how many of them are handed over nevertheless."""
        strategy = arguments.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f'vision_feature_select_strategy must be "default" or "full"; got {strategy!r}')
        if strategy == "default":
            return 1, 0
        return int(self.class_token), int(self.class_token)
