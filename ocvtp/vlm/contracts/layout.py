"""What a model's configuration alone says of its images: layers, numbers of tokens, what is chosen among."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.contracts.settings import Settings

#: Where a layout's facts are told of no other device.
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TowerFacts:
    """Static facts about a model's vision side, for checks and the report.

    Attributes:
        tower: ``model_type`` of the vision tower.
        width: of the features a pruner reads.
        unit: patches along each side of a token that is chosen or dropped: 1, or 2 where 2 x 2 are merged.
        num_layers: of the tower.
        consumed_layers: encoder layers whose outputs the language model consumes.
        tokens: candidates of every image; ``None`` where images differ.
        extra_rows: rows per image that are kept on top of the budget.
        attention: attention implementation of the tower.
        device: where it computes.
    """

    tower: str
    width: int
    num_layers: int
    consumed_layers: tuple[int, ...]
    tokens: int | None
    extra_rows: int
    attention: str
    device: torch.device
    unit: int = 1


class Layout:
    """A family's images as far as its configuration tells: no model is needed, and none is looked at.

    Args:
        config: of the model.
        vision: of its tower, if not ``config.vision_config``.
    """

    #: Options of :func:`ocvtp.apply` that not every family has, which this one has.
    options: frozenset[str] = frozenset()

    def __init__(self, config: Any, vision: Any = None) -> None:
        self.config = config
        self.vision = config.vision_config if vision is None else vision

    def facts(
        self, arguments: Mapping[str, Any], *, attention: str = "", device: torch.device = CPU
    ) -> TowerFacts:
        """The vision side under the configuration and per-call ``arguments``.

        Args:
            arguments: of a call.
            attention: implementation of the tower's attention, which is passed on.
            device: of the tower, likewise.

        Raises:
            ValueError: arguments that this family's towers can't serve.
        """
        raise NotImplementedError

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that this family can't serve."""
        for name in ("layout", "newlines", "frames", "tower"):
            if name not in self.options and getattr(settings, name) != Settings.default(name):
                raise ValueError(
                    f"{name}={getattr(settings, name)!r} is not available for {self.config.model_type}"
                )
        tokens = self.facts({}).tokens
        if tokens is not None:
            settings.budget.check(tokens)


def first(size: Any) -> int:
    """The side of a square that a configuration spells as one number or as two."""
    return int(size if isinstance(size, int) else size[0])
