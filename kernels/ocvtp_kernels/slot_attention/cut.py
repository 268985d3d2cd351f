"""Tiles and arithmetic of one call of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._tiles import tile, tile_of_rows

# Attention in float16 is stored times 2^12, which is exact: a starved slot's sum of 2e-6 then keeps an error
# of 4e-4, and all of it would underflow otherwise.
_SCALE = 4096.0
_ALIGNED = 16  # elements; rows of the attention are padded to it, so that they load in 16-byte pieces


class Cut(NamedTuple):
    """Tiles and arithmetic of one call."""

    arch: str
    bits: str
    dtype: torch.dtype
    device: torch.device
    precision: str
    scale: float

    def of(self, kernel: str, role: str, rows: int | None = None) -> dict[str, int]:
        """The tile of a kernel for this arithmetic; by number of ``rows`` where bits don't depend on it."""
        name, shape = f"slot_attention.{kernel}", f"{role}-{self.bits}"
        if rows is None:
            return dict(tile(name, self.arch, shape))
        return dict(tile_of_rows(name, self.arch, shape, rows))

    @property
    def normalise(self) -> dict[str, int]:
        """The tile of the kernel that normalises, which is the same for all arithmetic."""
        return dict(tile("slot_attention.normalise", self.arch, "any"))

    @property
    def copies(self) -> bool:
        """Whether float32 rows need a copy in the dtype of the products."""
        return self.dtype != torch.float32


def arithmetic(device: torch.device, dtype: torch.dtype, tf32: bool) -> Cut:
    """Of products in ``dtype`` on ``device``."""
    arch = architecture(device)
    assert arch is not None
    if dtype != torch.float32:
        # bfloat16 has the exponents of float32.
        return Cut(arch, "16bit", dtype, device, "ieee", _SCALE if dtype == torch.float16 else 1.0)
    # Three tf32 products are as good as float32, and on tensor cores; CDNA has float32 ones.
    precise = "ieee" if arch.startswith("gfx") else "tf32x3"
    return Cut(arch, "32bit", dtype, device, "tf32" if tf32 else precise, 1.0)


def padded_slots(slots: int) -> int:
    """Numbers in a row of attention."""
    return (slots + _ALIGNED - 1) // _ALIGNED * _ALIGNED
