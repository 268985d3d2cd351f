"""What all selectors share."""

from __future__ import annotations

import torch

from ocvtp.selection import Selection
from ocvtp_kernels._checks import require_count, require_floating, require_shape


def check_features(features: torch.Tensor, keep: int) -> int:
    """``keep``; raises unless ``features`` are ``[B, N, C]`` floating point and ``1 <= keep <= N``."""
    require_floating("features", features)
    require_shape("features", features, (None, None, None), "[B, N, C]")
    return require_count("keep", keep, features.shape[1], "the number of tokens N")


def chosen(tokens: torch.Tensor, total: int) -> Selection:
    """A selection of ``tokens`` ``[B, keep]`` of ``total``, in any order; none of them is a slot's."""
    no_slots = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    return Selection(tokens.sort(dim=1).values, no_slots, tokens=total)
