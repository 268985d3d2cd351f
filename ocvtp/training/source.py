"""Where training takes features from: stored ones or fresh ones, all the same to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


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
