"""What operator and kernels agree on about sizes and results."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._tiles import tile

#: Of the features: a row is normalised in registers.
MAX_WIDTH = 16384
# Classes of tiles of the kernel that attends, by slots. A tile that can't hold them all takes them in chunks.
_SLOT_CLASSES = (64, 128, 256)


class TopTokens(NamedTuple):
    """Every slot's top token, and what selection needs besides; made by
    :func:`ocvtp_kernels.slot_attention.top_tokens`.

    Attributes:
        keys: ``[B, T, K]`` int64. The largest of a slot's T keys names its top token: the upper 32 bits order
            like its attention, the lower ones are 0x7FFFFFFF - token, so that ties go to the lowest token.
        largest: ``[B, N]`` float32, each token's largest attention.
        finite: ``[B, N]`` bool, false where NaN or Inf got in.
    """

    keys: torch.Tensor
    largest: torch.Tensor
    finite: torch.Tensor


class Places(NamedTuple):
    """Memory for :class:`TopTokens`, in one piece: one copy takes them all.

    Attributes:
        packed: int64, one-dimensional.
        keys_shape: ``(B, T, K)``.
        tokens: N.
    """

    packed: torch.Tensor
    keys_shape: tuple[int, int, int]
    tokens: int

    @staticmethod
    def empty(images: int, tokens: int, slots: int, device: torch.device, dtype: torch.dtype) -> Places:
        """For what weights in ``dtype`` find on ``device``."""
        tiles = 1 if architecture(device) is None else token_tiles(slots, tokens, device, dtype)
        shape = (images, tiles, slots)
        _, _, words = _starts(shape, tokens)
        return Places(torch.empty(words, dtype=torch.int64, device=device), shape, tokens)

    def clone(self) -> Places:
        """The same, elsewhere: one copy."""
        return self._replace(packed=self.packed.clone())

    @property
    def top(self) -> TopTokens:
        """What lies there: views."""
        images, tiles, slots = self.keys_shape
        largest, finite, _ = _starts(self.keys_shape, self.tokens)
        rows = (images, self.tokens), (self.tokens, 1)
        # Few calls: they are made once a replay.
        return TopTokens(
            self.packed.as_strided(self.keys_shape, (tiles * slots, slots, 1)),
            self.packed.view(torch.float32).as_strided(*rows, 2 * largest),
            self.packed.view(torch.bool).as_strided(*rows, 8 * finite),
        )


def _starts(keys_shape: tuple[int, int, int], tokens: int) -> tuple[int, int, int]:
    """Words of 8 bytes before ``largest``, before ``finite``, and in all. Each starts at 16 bytes, so that
    kernels load it as they load what has memory of its own."""
    rows = keys_shape[0] * tokens
    largest = _even(math.prod(keys_shape))
    finite = largest + _even(-(-4 * rows // 8))
    return largest, finite, finite + _even(-(-rows // 8))


def _even(words: int) -> int:
    return words + words % 2


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
