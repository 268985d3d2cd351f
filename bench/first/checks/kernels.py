"""Kernels that do next to nothing, to see what launching and waiting cost."""

import triton
import triton.language as tl


@triton.jit
def add_one(counter_ptr, DEPENDENT: tl.constexpr):
    """Grid (1): one more. DEPENDENT: it may start before the launch in front is done, and waits here."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit
def in_turn(words_ptr, sums_ptr, PHASES: tl.constexpr, TASKS: tl.constexpr):
    """Grid (PHASES x TASKS): a program draws a task by a ticket, waits for all tasks of the phase before, and
    adds that phase's sum to its own phase's. Words: the ticket, how many programs have left, and of each
    phase how many tasks are done; all zero again when the last program leaves."""
    ticket = tl.atomic_add(words_ptr, 1, sem="relaxed")
    phase = ticket // TASKS
    if phase > 0:
        while tl.atomic_add(words_ptr + 1 + phase, 0, sem="acquire") < TASKS:
            pass
    before = tl.load(sums_ptr + phase, volatile=True)
    tl.store(sums_ptr + phase + 1, before + 1, mask=ticket % TASKS == 0)
    tl.debug_barrier()
    tl.atomic_add(words_ptr + 2 + phase, 1, sem="release")
    if tl.atomic_add(words_ptr + 1, 1, sem="acq_rel") == PHASES * TASKS - 1:
        for word in range(PHASES + 2):
            tl.store(words_ptr + word, 0)
