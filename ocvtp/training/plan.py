"""What a run is: checked before anything slow, and compared with what a folder already holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ocvtp.pruner.config import PrunerConfig
from ocvtp.training.recipe import Recipe
from ocvtp.training.source import FeatureSource
from ocvtp.training.split import split
from ocvtp.training.step import standard_deviation

# Records that the features' standard deviation is measured on.
_SAMPLE = 64


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a run computes, but the features' values.

    Attributes:
        recipe: how.
        config: of the pruner; its ``feature_scale`` may still have to be measured, see :meth:`scaled`.
        source: of features.
        records: of it that are trained on.
        held_source: of held-out features; often ``source``.
        held_out: of it that are held out.
    """

    recipe: Recipe
    config: PrunerConfig
    source: FeatureSource
    records: Sequence[int]
    held_source: FeatureSource
    held_out: Sequence[int]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be taken up; JSON-ready."""
        return {
            "recipe": self.recipe.to_dict(),
            "pruner": self.config.to_dict(),
            "features": {
                "fingerprint": self.source.fingerprint,
                "training": _digest(self.source, self.records),
                "validation": _digest(self.held_source, self.held_out),
            },
        }

    def scaled(self, scale: float | None) -> Plan:
        """The plan with this unit of the features, or the one that the recipe asks for.

        Raises:
            ValueError: features that are all the same, or not finite.
        """
        if not self.recipe.unit_variance:
            return self
        if scale is None:
            step = max(1, len(self.records) // _SAMPLE)
            sample = [self.records[i] for i in range(0, len(self.records), step)][:_SAMPLE]
            scale = standard_deviation(self.source.batch(sample))
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(
                    f"the features' standard deviation is {scale}: there is nothing to learn from them"
                )
        return replace(self, config=replace(self.config, feature_scale=scale))


def default_config(source: FeatureSource, **changes: Any) -> PrunerConfig:
    """The official proportions at the width of ``source``, with a decoder; ``changes`` win.

    Raises:
        ValueError: sizes that no pruner can have, or unknown names.
    """
    width = source.width
    sizes: dict[str, Any] = {
        "in_dim": width,
        "hidden_dim": 2 * width,
        "slot_dim": max(16, width // 2 // 16 * 16),
        "ffn_dim": 2 * width,
        "layer": source.layer,
        "unit": source.unit,
        "decoder_layers": 4,
        "decoder_ffn_dim": 4 * width,
        "decoder_tokens": source.tokens,
    }
    return PrunerConfig.from_dict({**sizes, **changes})


def make_plan(
    source: FeatureSource,
    validation: FeatureSource | None,
    recipe: Recipe,
    config: PrunerConfig,
) -> Plan:
    """Split, and refuse what would fail later.

    Raises:
        ValueError: settings that don't fit the features or each other.
    """
    if validation is None:
        held_source = source
        records, held_out = split(source.images, recipe.validation_share, recipe.seed)
    else:
        _check_validation(source, validation)
        held_source = validation
        records, held_out = list(range(len(source))), list(range(len(validation)))
    if len(records) < recipe.batch_size:
        raise ValueError(
            f"{len(records)} records to train on are fewer than a batch of {recipe.batch_size}: give more "
            "images or crops, or a smaller batch_size"
        )
    if not config.decoder_layers:
        raise ValueError(
            "the pruner's config has no decoder (decoder_layers=0); give it some layers, 4 as published"
        )
    for name, mine, theirs in (
        ("in_dim", config.in_dim, source.width),
        ("layer", config.layer, source.layer),
        ("unit", config.unit, source.unit),
        ("decoder_tokens", config.decoder_tokens, source.tokens),
    ):
        if mine != theirs:
            raise ValueError(f"the pruner's {name} is {mine}, the features' is {theirs}; leave it out")
    if too_many := [count for count in recipe.slots if count > source.tokens]:
        raise ValueError(
            f"slots {too_many} are more than the {source.tokens} tokens of an image; leave them out"
        )
    return Plan(recipe, config, source, records, held_source, held_out)


def _check_validation(source: FeatureSource, validation: FeatureSource) -> None:
    if validation.fingerprint != source.fingerprint:
        raise ValueError(
            "training and validation features are of different encoders, layers or preprocessing"
        )
    if validation.tokens != source.tokens:
        raise ValueError(f"training images have {source.tokens} tokens, held-out ones {validation.tokens}")
    if not len(validation):
        raise ValueError("there are no validation features")
    if shared := set(source.images) & set(validation.images):
        raise ValueError(f"{len(shared)} photographs are in both training and validation features")


def _digest(source: FeatureSource, records: Sequence[int]) -> str:
    """Which photographs, in which order."""
    total = hashlib.sha256(source.fingerprint.encode())
    for record in records:
        total.update(source.images[record].encode())
    return total.hexdigest()[:16]
