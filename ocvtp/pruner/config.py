"""What a pruner is made of: sizes and the encoder layer it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_POSITIVE = ("in_dim", "hidden_dim", "slot_dim", "ffn_dim", "num_iters", "decoder_heads", "unit")
_NOT_NEGATIVE = ("layer", "decoder_layers", "decoder_ffn_dim", "decoder_tokens")


@dataclass(frozen=True)
class PrunerConfig:
    """Architecture of an :class:`~ocvtp.pruner.OCPruner`. Defaults are the official pruner for CLIP-L/14-336.

    Attributes:
        in_dim: width of the encoder features it reads.
        hidden_dim: hidden width of the token encoder.
        slot_dim: width of tokens and slots inside Slot Attention.
        ffn_dim: hidden width of the slots' MLP.
        num_iters: Slot Attention iterations.
        eps: added to a slot's total attention before dividing by it.
        layer: 0-based index of the encoder layer whose output it reads; 8 is ``hidden_states[9]``.
        unit: patches along each side of a token it chooses among: 1, or 2 where the model merges 2 x 2
            patches into one token (Qwen-VL), whose features are the patches' mean.
        dropout: dropout inside the slots' MLP while training.
        decoder_layers: layers of the reconstruction decoder; 0 means no decoder (inference only).
        decoder_heads: its attention heads. State dicts do not tell this number.
        decoder_ffn_dim: its MLP width.
        decoder_tokens: tokens per image its position embedding is made for.
        feature_scale: unit of the decoder's output, which reconstructs features divided by it. The official
            pruner has 1; our trainer takes the features' standard deviation.

    Raises:
        ValueError: a size that no network can have.
    """

    in_dim: int = 1024
    hidden_dim: int = 2048
    slot_dim: int = 512
    ffn_dim: int = 2048
    num_iters: int = 3
    eps: float = 1e-5
    layer: int = 8
    dropout: float = 0.01
    decoder_layers: int = 0
    decoder_heads: int = 4
    decoder_ffn_dim: int = 4096
    decoder_tokens: int = 576
    feature_scale: float = 1.0
    unit: int = 1

    def __post_init__(self) -> None:
        for name, least in [*((n, 1) for n in _POSITIVE), *((n, 0) for n in _NOT_NEGATIVE)]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"PrunerConfig.{name} must be an int >= {least}; got {value!r}")
        for name in ("eps", "dropout", "feature_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"PrunerConfig.{name} must be a finite number; got {value!r}")
        for name in ("eps", "feature_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"PrunerConfig.{name} must be positive; got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"PrunerConfig.dropout must be in [0, 1); got {self.dropout!r}")
        if self.decoder_layers and self.in_dim % self.decoder_heads:
            raise ValueError(
                f"PrunerConfig.decoder_heads={self.decoder_heads} must divide in_dim={self.in_dim}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrunerConfig:
        """A config from ``config.json``'s content; an unknown field raises ``ValueError``."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown PrunerConfig field(s) {unknown}: written by a newer version of ocvtp?")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


def read_json_object(path: Path) -> dict[str, Any]:
    """What a ``config.json`` holds, to tell a pruner's from a model's; empty if it can't be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
