"""How a pruner is trained: every number of it, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from ocvtp.stored.fields import Within, check_fields, from_object

Autocast = Literal["none", "bf16", "fp16"]

# No training has more; what does is a slip of the pen.
_Count = Annotated[int, Within(1, 10**6)]
_Share = Annotated[float, Within(0, 1)]
_Positive = Annotated[float, Within(0, 1e30, above=True)]
_NotNegative = Annotated[float, Within(0, 1e30)]


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

    epochs: _Count = 30
    batch_size: _Count = 12
    learning_rate: _Positive = 1e-3
    final_learning_rate: _NotNegative = 1e-8
    warmup_epochs: Annotated[float, Within(0, 10**6)] = 4.0
    weight_decay: _NotNegative = 0.01
    clip: _Positive = 1.0
    slots: Annotated[tuple[_Count, ...], Within(1, 1000)] = (16, 32, 64, 128)
    validation_share: _Share = 0.05
    patience: _Count = 5
    any_visible: _Share = 0.5
    visible: _Share = 0.1
    official_visible: bool = False
    truncate: bool = True
    power: _NotNegative = 0.5
    cap: _Positive = 10.0
    unit_variance: bool = True
    empty_slots: Literal["exclude", "official"] = "exclude"
    autocast: Autocast = "none"
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a file's content; an unknown field raises ``ValueError``, as a wrong one."""
        return from_object(cls, values, "Recipe.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {**asdict(self), "slots": list(self.slots)}
