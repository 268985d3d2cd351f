"""How a pruner is trained: every number of it, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Autocast = Literal["none", "bf16", "fp16"]

_COUNTS = ("epochs", "batch_size", "patience")
_POSITIVE = ("learning_rate", "clip", "cap")
_NOT_NEGATIVE = ("final_learning_rate", "weight_decay", "power", "warmup_epochs", "seed")
_SHARES = ("validation_share", "visible", "any_visible")


@dataclass(frozen=True)
class Recipe:
    """The published recipe (arXiv 2511.20439 and its official code), with its bugs mended.

    Mended: the learning rate follows its schedule step by step, validation sees held-out images behind a
    mask under a fixed seed, the mask's size follows the number of tokens, slots without tokens weigh nothing,
    and errors are relative to the features' variance, so that one recipe fits all encoders.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of one step, on all processes together.
        learning_rate: AdamW's, at its highest.
        final_learning_rate: at the last step.
        warmup_epochs: epochs, or a part of one, in which the learning rate grows from zero.
        weight_decay: AdamW's, on every parameter.
        clip: largest norm of the gradient.
        slots: numbers of slots; every step draws one of them.
        validation_share: of the source images that is held out.
        patience: epochs without a better validation loss after which training stops.
        any_visible: share of images of which any number of tokens stays visible to the decoder.
        visible: share of tokens that stays visible in all other images; 0.1 is the published code's.
        official_visible: take its hard-wired 24 visible tokens instead, which is 0.1 of 256 but not of 576.
        truncate: gradients through the last iteration only (``bi-level``); ``False``: through all of them.
        power: exponent of the area in the loss; 0 weighs all slots that own a token alike.
        cap: largest weight of a slot in the loss, in units of the mean.
        unit_variance: measure errors in units of the features' variance. The published recipe does not
            (``False``), and fits features of unit variance: with much smaller ones hardly a slot comes alive.
        empty_slots: what slots that own no token weigh: ``"exclude"`` or ``"official"``.
        autocast: ``"none"``, ``"bf16"`` or ``"fp16"`` (with a scaled loss).
        seed: of initial parameters, the held-out part, the order of images, and every step's draws.

    Raises:
        ValueError: a number that no training could use.
    """

    epochs: int = 30
    batch_size: int = 12
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-8
    warmup_epochs: float = 4.0
    weight_decay: float = 0.01
    clip: float = 1.0
    slots: tuple[int, ...] = (16, 32, 64, 128)
    validation_share: float = 0.05
    patience: int = 5
    any_visible: float = 0.5
    visible: float = 0.1
    official_visible: bool = False
    truncate: bool = True
    power: float = 0.5
    cap: float = 10.0
    unit_variance: bool = True
    empty_slots: Literal["exclude", "official"] = "exclude"
    autocast: Autocast = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))  # JSON has lists
        for name in _COUNTS:
            self._require(name, int, lambda value: value >= 1, "an int >= 1")
        self._require("seed", int, lambda value: 0 <= value < 2**63, "an int in [0, 2**63)")
        for name in _POSITIVE:
            self._require(name, (int, float), lambda value: value > 0, "a positive number")
        for name in _NOT_NEGATIVE:
            self._require(name, (int, float), lambda value: value >= 0, "a number >= 0")
        for name in _SHARES:
            self._require(name, (int, float), lambda value: 0 <= value <= 1, "a share between 0 and 1")
        for name in ("official_visible", "truncate", "unit_variance"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Recipe.{name} must be true or false; got {getattr(self, name)!r}")
        if not self.slots or not all(type(count) is int and count >= 1 for count in self.slots):
            raise ValueError(f"Recipe.slots must be one or more ints >= 1; got {self.slots!r}")
        if self.empty_slots not in ("exclude", "official"):
            raise ValueError(f'Recipe.empty_slots must be "exclude" or "official"; got {self.empty_slots!r}')
        if self.autocast not in get_args(Autocast):
            raise ValueError(f'Recipe.autocast must be "none", "bf16" or "fp16"; got {self.autocast!r}')

    def _require(self, name: str, kind: Any, holds: Any, meaning: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise ValueError(f"Recipe.{name} must be {meaning}; got {value!r}")
        if not holds(value):
            raise ValueError(f"Recipe.{name} must be {meaning}; got {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a file's content; an unknown field raises ``ValueError``."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown recipe field(s) {unknown}; there are: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {**asdict(self), "slots": list(self.slots)}
