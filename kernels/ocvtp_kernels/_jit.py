# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Device functions shared by the Triton kernels."""

import triton
import triton.language as tl

#: log2(e), as the kernels exponentiate in base 2 (one instruction; ``exp`` is five).
LOG2E = 1.4426950408889634


@triton.jit
def ordered_bits(x):
    """float32 -> uint32 with the same order: bigger float, bigger integer. -0.0 must have become 0.0."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
