"""What a pruner is made of: sizes and the encoder layer it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from ocvtp.stored.fields import Within, check_fields, from_object
from ocvtp.stored.refused import Refused
from ocvtp.stored.strict_json import read_object

# Several times what any published encoder has; more is a slip of the pen, or another program's file.
_Width = Annotated[int, Within(1, 2**15)]
_Positive = Annotated[float, Within(0, 1e6, above=True)]


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

    in_dim: _Width = 1024
    hidden_dim: _Width = 2048
    slot_dim: _Width = 512
    ffn_dim: _Width = 2048
    num_iters: Annotated[int, Within(1, 100)] = 3
    eps: _Positive = 1e-5
    layer: Annotated[int, Within(0, 1000)] = 8
    dropout: Annotated[float, Within(0, 1, below=True)] = 0.01
    decoder_layers: Annotated[int, Within(0, 100)] = 0
    decoder_heads: Annotated[int, Within(1, 2**15)] = 4
    decoder_ffn_dim: Annotated[int, Within(0, 2**17)] = 4096
    decoder_tokens: Annotated[int, Within(0, 2**17)] = 576
    feature_scale: _Positive = 1.0
    unit: Annotated[int, Within(1, 64)] = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.decoder_layers and self.in_dim % self.decoder_heads:
            raise ValueError(
                f"PrunerConfig.decoder_heads={self.decoder_heads} must divide in_dim={self.in_dim}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrunerConfig:
        """A config from ``config.json``'s content; an unknown field raises ``ValueError``, as a wrong one."""
        return from_object(cls, values, "PrunerConfig.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


def read_json_object(path: Path) -> dict[str, Any]:
    """What a ``config.json`` holds, to tell a pruner's from a model's; empty if it can't be read."""
    try:
        return read_object(path)
    except Refused:
        return {}
