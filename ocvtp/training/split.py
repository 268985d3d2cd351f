"""Which records are trained on and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def split(images: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the records to train on, and of those held out; whole photographs, never parts of one.

    Args:
        images: for every record, its photograph's digest.
        share: of the photographs that is held out, at least one.
        seed: which ones. Otherwise their content alone decides: neither names nor order matter.

    Raises:
        ValueError: fewer than two photographs, or none left to train on.
    """
    photographs = sorted(set(images), key=lambda image: hashlib.sha256(f"{seed}/{image}".encode()).digest())
    held = max(1, round(share * len(photographs)))
    if held >= len(photographs):
        raise ValueError(
            f"{len(photographs)} photograph(s) can't be split into training and validation with a share of "
            f"{share}; give more images, or a smaller share"
        )
    held_out = set(photographs[:held])
    train = [i for i, image in enumerate(images) if image not in held_out]
    return train, [i for i, image in enumerate(images) if image in held_out]
