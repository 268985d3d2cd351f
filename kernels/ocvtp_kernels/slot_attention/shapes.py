"""What operator and kernels agree on about sizes and results."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._tiles import tile

#: Of the features: a row is normalised in registers.
MAX_WIDTH = 16384
# Classes of tiles of the kernel that attends, by slots. A tile that can't hold them all takes them in chunks.
_SLOT_CLASSES = (64, 128, 256)


class Assigned(NamedTuple):
    """What the last iteration of the kernels leaves."""

    keys: torch.Tensor  # [B, tiles, K] int64
    largest: torch.Tensor  # [B, N] float32
    finite: torch.Tensor  # [B, N] bool
    attention: torch.Tensor  # [B, K, N] float32, or empty


def slot_class(slots: int) -> str:
    """Tile class for so many slots."""
    return next((f"K<={most}" for most in _SLOT_CLASSES if slots <= most), "any K")


def token_tiles(slots: int, tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """Into how many tiles the tokens of an image are cut; ``dtype`` is that of the weights."""
    arch = architecture(device)
    assert arch is not None
    bits = "16bit" if dtype == torch.float16 else "32bit"
    size = tile("slot_attention.attend", arch, f"{slot_class(slots)}-{bits}")["BM"]
    return (tokens + size - 1) // size
