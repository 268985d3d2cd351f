"""Whether a pruner was made for a model's vision encoder."""

from __future__ import annotations

from ocvtp.pruner.config import PrunerConfig
from ocvtp.vlm.contracts.layout import TowerFacts


def check_fit(config: PrunerConfig, facts: TowerFacts, model: str = "MODEL") -> None:
    """Raise unless a pruner of this configuration reads what this encoder makes.

    Args:
        config: of the pruner.
        facts: of the encoder.
        model: where the model was loaded from.

    Raises:
        ValueError: another width, token unit or layer; the message has the commands that train one.
    """
    if config.in_dim != facts.width:
        raise ValueError(
            f"the pruner reads features of width {config.in_dim}, the {facts.tower} of this model makes them "
            f"{facts.width} wide; {how_to_train(facts, model)}"
        )
    if config.unit != facts.unit:
        raise ValueError(
            f"the pruner reads tokens of {config.unit} x {config.unit} patches, this model chooses among "
            f"tokens of {facts.unit} x {facts.unit}; {how_to_train(facts, model)}"
        )
    if not 0 <= config.layer <= max(facts.consumed_layers):
        too_late = _too_late("the pruner reads", config.layer, facts.consumed_layers)
        raise ValueError(f"{too_late}; {how_to_train(facts, model)}")


def check_layers(read: int | None, consumed: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if tokens are chosen by a layer beyond the deepest one a call consumes."""
    if read is not None and not 0 <= read <= max(consumed):
        raise ValueError(
            f"{_too_late('tokens are chosen by', read, consumed)}; use another vision_feature_layer, or a "
            "pruner trained on an earlier layer"
        )


def _too_late(who: str, layer: int, consumed: tuple[int, ...]) -> str:
    return (
        f"{who} encoder layer {layer}, which must not be beyond the deepest layer that the language model "
        f"consumes ({max(consumed)})"
    )


def how_to_train(facts: TowerFacts, model: str) -> str:
    """What to do for a pruner that fits."""
    layer = max(0, min(8, max(facts.consumed_layers) - 1))
    return (
        f"use one trained for this encoder: ocvtp features IMAGES --encoder {model} "
        f"--layer {layer} --out FEATURES, then ocvtp train --features FEATURES --out PRUNER"
    )
