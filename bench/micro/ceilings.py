"""What a device can do at most, and the shortest time that this leaves for a piece of work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

#: Of matrix products: 16-bit operands, TF32 ones, or results as exact as float32 ones.
Arithmetic = Literal["16-bit", "tf32", "fp32"]

_EXPONENTIALS = 16 * 132 * 1.755e9  # a clock and multiprocessor, multiprocessors, clock


@dataclass(frozen=True)
class Ceilings:
    """Per second: bytes of device memory, dense 16-bit floating-point operations, exponentials, TF32 ones."""

    bytes: float
    flops: float
    exponentials: float
    tf32: float

    def products(self, arithmetic: Arithmetic) -> float:
        """Floating-point operations of matrix products.

        To be as exact as float32, a product takes three TF32 products or six bfloat16 ones, which cost the
        same; plain float32 units (67e12 on an H100) are slower.
        """
        return {"16-bit": self.flops, "tf32": self.tf32, "fp32": self.tf32 / 3}[arithmetic]

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)


#: By the name of a results folder. Data sheets of the SXM parts (PCIe and NVL ones differ and have no row),
#: whose operations of tensor cores count sparsity, so half of them (1979e12 in 16 bit, 989e12 in TF32);
#: exponentials: CUDA programming guide, throughput of arithmetic instructions, compute capability 9.0.
CEILINGS = {
    "h100": Ceilings(3.35e12, 989e12, _EXPONENTIALS, 495e12),
    "h200": Ceilings(4.8e12, 989e12, _EXPONENTIALS, 495e12),
}


@dataclass(frozen=True)
class Work:
    """The least that an operation must do: each input read once, each output written once."""

    read: int
    written: int
    flops: int = 0
    exponentials: int = 0
    arithmetic: Arithmetic = "16-bit"

    @property
    def bytes(self) -> int:
        """Moved through device memory."""
        return self.read + self.written

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """Microseconds below which the work can't be done, and what sets them."""

    us: float
    limit: str

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """The largest of the times that each ceiling alone would take: they may overlap, not be beaten."""
    terms = {
        "bytes": work.bytes / ceilings.bytes,
        "flops": work.flops / ceilings.products(work.arithmetic),
        "exponentials": work.exponentials / ceilings.exponentials,
    }
    limit = max(terms, key=lambda term: terms[term])
    return Floor(terms[limit] * 1e6, limit)
