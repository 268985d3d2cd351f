"""A kernel whose programs draw tasks and wait for each other, to be compiled by a test."""

import triton
import triton.language as tl


@triton.jit
def two_phases(
    x_ptr,
    y_ptr,
    counters_ptr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    TIMES: tl.constexpr,
):
    """FIRST tasks write a block of x each; then others copy TIMES blocks of it each."""
    ticket = tl.atomic_add(counters_ptr, 1)
    offsets = tl.arange(0, BLOCK)
    if ticket < FIRST:
        tl.store(x_ptr + ticket * BLOCK + offsets, offsets.to(tl.float32))
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + 1, 1, sem="release")
    else:
        while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < FIRST:
            pass
        task = ticket - FIRST
        for time in tl.range(0, TIMES):
            block = task * TIMES + time
            tl.store(y_ptr + block * BLOCK + offsets, tl.load(x_ptr + (block % FIRST) * BLOCK + offsets))
