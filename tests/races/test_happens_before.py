# No postponed annotations: the interpreter looks for the very object tl.constexpr.
# ruff: noqa: ANN001, ANN201, ANN202 (device functions: types are Triton's)
"""A small kernel of tasks, as it should be, and with everything left out that can be: that is found."""

import random
import re

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ocvtp_kernels._arch import interpreting
from tests.races import happens_before as hb
from tests.races.findings import NO_BARRIER, WRITTEN_OUTSIDE
from tests.races.instrument import instrumented

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")

PARTS, ROUNDS, BLOCK = 3, 3, 4
TASKS = ROUNDS * (PARTS + 2)


@triton.jit
def _wait(word_ptr, want, SEM: tl.constexpr):
    if tl.atomic_add(word_ptr, 0, sem=SEM) < want:
        while tl.atomic_add(word_ptr, 0, sem=SEM) < want:
            pass


@triton.jit
def rounds(
    a_ptr, b_ptr, c_ptr, sync_ptr, order_ptr, TASKS, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    FILL_WAITS: tl.constexpr, SUM_WAITS: tl.constexpr, LAST_WAITS: tl.constexpr, WAIT: tl.constexpr,
    SIGNAL: tl.constexpr, BARRIER_AFTER: tl.constexpr, BARRIER_BEFORE: tl.constexpr, STRAY: tl.constexpr,
):  # fmt: skip
    """A round: PARTS tasks fill ``a`` from ``c``; one sums it into ``b``; one adds ``b`` up in ``c``.

    Words: ticket, leavers, how many have filled, summed, added. The next round fills when all is added.
    """
    i = tl.arange(0, BLOCK)
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    while ticket < TASKS:
        task = tl.load(order_ptr + ticket)
        turn = task // (PARTS + 2)
        part = task - turn * (PARTS + 2)
        if part < PARTS:
            if FILL_WAITS and turn > 0:
                _wait(sync_ptr + 4, turn, WAIT)
                if BARRIER_AFTER:
                    tl.debug_barrier()
            tl.store(a_ptr + part * BLOCK + i, tl.load(c_ptr) + part + 1)
            if STRAY == 3:  # looks at what it has just written
                tl.load(a_ptr + part * BLOCK + i)
            if STRAY == 4:  # and beyond
                tl.store(a_ptr - 1, 0.0)
            if BARRIER_BEFORE:
                tl.debug_barrier()
            tl.atomic_add(sync_ptr + 2, 1, sem=SIGNAL)
        else:
            if part == PARTS:
                if SUM_WAITS > 0:
                    _wait(sync_ptr + 2, turn * PARTS + SUM_WAITS, WAIT)
                    if BARRIER_AFTER:
                        tl.debug_barrier()
                total = tl.sum(tl.load(a_ptr + i), axis=0)
                for other in tl.range(1, PARTS):
                    total += tl.sum(tl.load(a_ptr + other * BLOCK + i), axis=0)
                tl.store(b_ptr, total)
                if BARRIER_BEFORE:
                    tl.debug_barrier()
                tl.atomic_add(sync_ptr + 3, 1, sem=SIGNAL)
            else:
                if LAST_WAITS:
                    _wait(sync_ptr + 3, turn + 1, WAIT)
                    if BARRIER_AFTER:
                        tl.debug_barrier()
                tl.store(c_ptr, tl.load(c_ptr) + tl.load(b_ptr))
                if BARRIER_BEFORE:
                    tl.debug_barrier()
                tl.atomic_add(sync_ptr + 4, 1, sem=SIGNAL)
                if STRAY == 1:  # says something more
                    tl.store(b_ptr, 0.0)
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if STRAY == 2:  # after all tasks
        tl.store(c_ptr, 0.0)
    if tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(sync_ptr + tl.arange(0, 8), tl.zeros([8], tl.int32), mask=tl.arange(0, 8) < 5)


RIGHT = {
    "FILL_WAITS": True, "SUM_WAITS": PARTS, "LAST_WAITS": True, "WAIT": "acquire", "SIGNAL": "release",
    "BARRIER_AFTER": True, "BARRIER_BEFORE": True, "STRAY": 0,
}  # fmt: skip


def shuffled(seed: int) -> list[int]:
    """Tasks in another order, the steps of a round one after another."""
    order = []
    for turn in range(ROUNDS):
        fills = [turn * (PARTS + 2) + part for part in range(PARTS)]
        random.Random(seed).shuffle(fills)
        order += [*fills, fills[0] // (PARTS + 2) * (PARTS + 2) + PARTS, turn * (PARTS + 2) + PARTS + 1]
    return order


def check(
    order: list[int] | None = None, programs: int = 2, **changes: object
) -> tuple[hb.Checked, torch.Tensor]:
    a, b, c = torch.zeros(PARTS * BLOCK), torch.zeros(1), torch.zeros(1)
    sync = torch.zeros(5, dtype=torch.int32)
    tickets = hb.Tickets(sync, TASKS)
    numbers = torch.tensor(order or range(TASKS), dtype=torch.int32)
    with instrumented(log=True, watch=tickets) as launches:
        rounds[(programs,)](a, b, c, sync, numbers, TASKS, PARTS=PARTS, BLOCK=BLOCK, **{**RIGHT, **changes})
    assert not sync.any()
    return hb.analyse(launches[0], tickets), c


def kinds(checked: hb.Checked) -> set[str]:
    return {finding.kind for finding in checked.findings}


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_ordered_tasks_are_clean(seed: int | None) -> None:
    checked, total = check(None if seed is None else shuffled(seed))
    assert checked.findings == []
    # Every fill meets every sum, and every last, of all rounds; so does every sum every last; and sums, and
    # lasts, and what fills the same, meet each other.
    fills, others = ROUNDS * PARTS, 3
    assert checked.pairs == 2 * fills * ROUNDS + ROUNDS * ROUNDS + (2 + PARTS) * others
    assert float(total) == 24 + (24 + 12 * 24) + (24 + 12 * (24 + 24 + 12 * 24))


FAULTS: list[tuple[dict[str, object], set[str]]] = [
    ({"SUM_WAITS": 0}, {hb.UNORDERED}),
    ({"SUM_WAITS": PARTS - 1}, {hb.UNORDERED}),  # which one is not there yet is chance
    ({"LAST_WAITS": False}, {hb.UNORDERED}),
    ({"FILL_WAITS": False}, {hb.UNORDERED}),  # overwritten while it is read
    ({"WAIT": "relaxed"}, {hb.RELAXED}),
    ({"WAIT": "release"}, {hb.RELAXED}),
    ({"SIGNAL": "relaxed"}, {hb.RELAXED}),
    ({"SIGNAL": "acquire"}, {hb.RELAXED}),
    ({"BARRIER_AFTER": False}, {hb.EARLY}),
    ({"BARRIER_BEFORE": False}, {hb.LATE}),
    ({"STRAY": 1}, {hb.LATE}),
    ({"STRAY": 2}, {hb.ELSEWHERE}),
    ({"STRAY": 3}, {NO_BARRIER}),
    ({"STRAY": 4}, {WRITTEN_OUTSIDE, hb.UNORDERED}),
]


@pytest.mark.parametrize(("changes", "wrong"), FAULTS, ids=[str(changes) for changes, _ in FAULTS])
@pytest.mark.parametrize("seed", [None, 1])
def test_whatever_is_left_out_is_found(changes: dict[str, object], wrong: set[str], seed: int | None) -> None:
    checked, _ = check(None if seed is None else shuffled(seed), **changes)
    assert kinds(checked) == wrong


def test_findings_say_where() -> None:
    checked, _ = check(SUM_WAITS=0)
    (finding,) = checked.findings
    assert finding.kernel == "rounds"
    assert finding.count == PARTS * BLOCK + 2  # all of a, and b and c, which come of it
    assert re.fullmatch(r"tasks 0 and \d+, element 0 from the start of [abc]_ptr", finding.example)


def test_a_wait_that_nobody_ends_is_an_error() -> None:
    order = list(range(TASKS))
    order[PARTS - 1], order[PARTS] = order[PARTS], order[PARTS - 1]
    with pytest.raises(
        Exception, match=f"StuckError.*task {PARTS - 1} waits for more than {PARTS - 1} at word 2"
    ):
        check(order)


def test_acquire_and_release_in_one_are_both() -> None:
    assert check(WAIT="acq_rel", SIGNAL="acq_rel")[0].findings == []


@triton.jit
def odd(sync_ptr, WORD: tl.constexpr, ADDED: tl.constexpr, TAKE: tl.constexpr):
    if TAKE:
        tl.atomic_add(sync_ptr, 1)
    tl.atomic_add(sync_ptr + WORD, ADDED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 2, True), "must add 0 or 1"), ((3, 1, False), "outside of a task")],
)
def test_other_atomics_are_refused(arguments: tuple[int, int, bool], message: str) -> None:
    sync = torch.zeros(5, dtype=torch.int32)
    with instrumented(log=True, watch=hb.Tickets(sync, 4)), pytest.raises(Exception, match=message):
        odd[(1,)](sync, *arguments)


def test_words_must_be_zero() -> None:
    for words in (torch.ones(5, dtype=torch.int32), torch.zeros(5), torch.zeros(10, dtype=torch.int32)[::2]):
        with pytest.raises(ValueError, match="zeros"):
            hb.Tickets(words, 4)
