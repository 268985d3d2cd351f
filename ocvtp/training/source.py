"""Where training takes features from: stored ones or fresh ones, all the same to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoder(Protocol):
    """Something that makes features of pictures.

    Attributes:
        name: for messages.
        layer: 0-based, whose output features are.
        width: C.
        tokens: N of every picture.
        unit: patches along the side of a token.
        identity: what features depend on, JSON-ready.
        fingerprint: digest of the identity.
        note: what had to be assumed, or ``None``.
    """

    name: str
    layer: int
    width: int
    tokens: int
    unit: int
    identity: dict[str, Any]
    fingerprint: str
    note: str | None

    def __call__(self, images: Sequence[Image]) -> torch.Tensor:
        """Tokens ``[b, N, C]`` float16 on the CPU."""


class FeatureSource(Protocol):
    """Patch tokens of one encoder layer, image by image."""

    @property
    def tokens(self) -> int:
        """N of every image."""

    @property
    def width(self) -> int:
        """C."""

    @property
    def layer(self) -> int:
        """0-based encoder layer whose output they are."""

    @property
    def unit(self) -> int:
        """Patches along the side of a token, see :class:`~ocvtp.pruner.config.PrunerConfig`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of encoder, preprocessing and layer: equal means comparable features."""

    @property
    def images(self) -> Sequence[str]:
        """For every record, the digest of the photograph it was cut from.

        Records of one photograph belong on the same side of a split.
        """

    def __len__(self) -> int:
        """Records."""

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """``[b, N, C]`` float16 of these records, in this order, on the CPU."""
