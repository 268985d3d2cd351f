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


@triton.jit
def after_launches_before(PDL: tl.constexpr):
    """Begin: with PDL the launches before have ended from here on, and the next one may be put in place.

    Programmatic dependent launch: a kernel's programs are set up while the one before still runs. All that it
    reads or writes comes after this, so nothing else about the order of launches changes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
