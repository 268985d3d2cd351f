"""Where training takes features from: stored ones or fresh ones, all the same to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class FeatureSource(Protocol):
    """Patch tokens of one encoder layer, image by image.

    Attributes:
        tokens: N of every image.
        width: C.
        layer: 0-based encoder layer whose output they are.
        fingerprint: hex digest of encoder, preprocessing and layer: equal means comparable features.
        images: for every record, the digest of the photograph it was cut from. Records of one photograph
            belong on the same side of a split.
    """

    tokens: int
    width: int
    layer: int
    fingerprint: str

    @property
    def images(self) -> Sequence[str]:
        """One of every record."""

    def __len__(self) -> int:
        """Records."""

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """``[b, N, C]`` float16 of these records, in this order, on the CPU."""
