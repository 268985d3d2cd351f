# No postponed annotations: the interpreter looks for the very object tl.constexpr.
# ruff: noqa: ANN001, ANN002, ANN003, ANN201 (device functions: types are Triton's)
"""Faults of every kind are planted in small kernels, and found; the same kernels without them are clean."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from ocvtp_kernels._arch import interpreting
from tests.races import findings
from tests.races.instrument import Order, instrumented

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")

N, BLOCK = 40, 16
GRID = (triton.cdiv(N, BLOCK),)


@triton.jit
def neighbour(x_ptr, N, AWAY: tl.constexpr, BLOCK: tl.constexpr):
    """AWAY > 0: reads what other programs write."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + (n + AWAY) % N, mask=n < N)
    tl.store(x_ptr + n, value + 1.0, mask=n < N)


@triton.jit
def everybody(x_ptr, out_ptr, VALUE: tl.constexpr, ATOMIC: tl.constexpr):
    """Every program writes to one place: its number, or VALUE, or adds."""
    if ATOMIC:
        tl.atomic_add(out_ptr, 1.0)
    else:
        tl.store(out_ptr, tl.program_id(0) * (1.0 - VALUE) + VALUE)
        if VALUE > 0:  # and reads it back
            tl.debug_barrier()
            tl.store(x_ptr + tl.program_id(0), tl.load(out_ptr))


@triton.jit
def copy(x_ptr, y_ptr, FROM: tl.constexpr, TO: tl.constexpr, N, BLOCK: tl.constexpr):
    """Elements FROM on of x to TO on of y."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + TO + n, tl.load(x_ptr + FROM + n, mask=n < N), mask=n < N)


@triton.jit
def back(x_ptr, y_ptr, N, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Reads what it has written itself, in another order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + n, n.to(tl.float32), mask=n < N)
    if BARRIER:
        tl.debug_barrier()
    m = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(y_ptr + m, tl.load(x_ptr + m, mask=m < N), mask=m < N)


@triton.jit
def again(x_ptr, BARRIER: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a place twice; OTHER bits the second time."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + n, 1.0 + tl.zeros([BLOCK], tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + n, 1.0 + OTHER + tl.zeros([BLOCK], tl.float32))


@triton.jit
def shift(x_ptr, BY: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """In one program: what it reads goes to another place that it has read."""
    n = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + (n + BY) % BLOCK, value)


@triton.jit
def running(x_ptr, total_ptr):
    """Every program leaves the sum so far, and adds its own number: a result that depends on the order."""
    total = tl.load(total_ptr) + tl.program_id(0) + 1
    tl.store(x_ptr + tl.program_id(0), total)
    tl.store(total_ptr, total)


def found(launch, grid=GRID, /, *arguments, **constants) -> dict[str, findings.Finding]:
    """Kind -> what the check says of one launch."""
    with instrumented(log=True) as launches:
        launch[grid](*arguments, **constants)
    (only,) = launches
    assert only.accesses
    result = findings.analyse(only)
    assert len({finding.kind for finding in result}) == len(result)
    assert all(finding.kernel == launch.fn.__name__ for finding in result)
    return {finding.kind: finding for finding in result}


def test_what_another_program_writes_may_not_be_read() -> None:
    assert not found(neighbour, GRID, torch.zeros(N), N, AWAY=0, BLOCK=BLOCK)
    faults = found(neighbour, GRID, torch.zeros(N), N, AWAY=1, BLOCK=BLOCK)
    # Each program's last reads the next one's first; and within a program each reads what another writes.
    assert faults[findings.FOREIGN].count == 3
    assert faults[findings.FOREIGN].example == "programs [0, 2], element 0 from the start of x_ptr"
    assert set(faults) == {findings.FOREIGN, findings.TOO_EARLY}


def test_programs_may_not_write_different_bits_to_one_place() -> None:
    x, out = torch.zeros(3), torch.zeros(1)
    faults = found(everybody, (3,), x, out, VALUE=0.0, ATOMIC=False)
    assert set(faults) == {findings.TWO_WRITERS}
    assert faults[findings.TWO_WRITERS].count == 1
    assert faults[findings.TWO_WRITERS].example == "programs [0, 1, 2], element 0 from the start of out_ptr"
    alike = found(everybody, (3,), x, out, VALUE=1.0, ATOMIC=False)
    assert set(alike) == {findings.SAME_BITS}  # and reading back one's own is no fault of its own
    assert not found(everybody, (1,), x, out, VALUE=0.0, ATOMIC=False)


def test_atomics_count_as_writes() -> None:
    faults = found(everybody, (3,), torch.zeros(3), torch.zeros(1), VALUE=0.0, ATOMIC=True)
    assert set(faults) == {findings.TWO_WRITERS}


@pytest.mark.parametrize("spaced", [False, True])
def test_only_elements_of_the_views_may_be_touched(spaced: bool) -> None:
    """The storage goes on beyond the views, and between their elements."""
    x, y = torch.zeros(4 * N), torch.zeros(4 * N)
    view, other = (t[N : 2 * N] for t in (x, y))
    arguments = {"N": N, "BLOCK": BLOCK}
    assert not found(copy, GRID, view, other, FROM=0, TO=0, **arguments)
    if spaced:
        view, other = (t[N : 3 * N : 2] for t in (x, y))
        read = found(copy, GRID, view, y[:N], FROM=0, TO=0, **arguments)
        assert read[findings.READ_OUTSIDE].count == N // 2
        written = found(copy, GRID, x[:N], other, FROM=0, TO=0, **arguments)
        assert written[findings.WRITTEN_OUTSIDE].count == N // 2
        return
    read = found(copy, GRID, view, other, FROM=3, TO=0, **arguments)
    assert set(read) == {findings.READ_OUTSIDE}
    assert read[findings.READ_OUTSIDE].count == 3
    assert read[findings.READ_OUTSIDE].example == f"program 2, element {N} from the start of x_ptr"
    written = found(copy, GRID, view, other, FROM=0, TO=-2, **arguments)
    assert set(written) == {findings.WRITTEN_OUTSIDE}
    assert written[findings.WRITTEN_OUTSIDE].count == 2


def test_an_element_of_another_size_is_outside() -> None:
    halves = torch.zeros(2 * N, dtype=torch.float16)
    with instrumented(log=True) as launches:
        copy[GRID](halves.view(torch.float32), torch.zeros(N), FROM=0, TO=0, N=N, BLOCK=BLOCK)
    launches[0].tensors["x_ptr"] = halves
    assert [finding.kind for finding in findings.analyse(launches[0])] == [findings.READ_OUTSIDE]


def test_a_program_may_not_read_what_it_has_written_without_a_barrier() -> None:
    assert not found(back, GRID, torch.zeros(N), torch.zeros(N), N, BARRIER=True, BLOCK=BLOCK)
    faults = found(back, GRID, torch.zeros(N), torch.zeros(N), N, BARRIER=False, BLOCK=BLOCK)
    assert set(faults) == {findings.NO_BARRIER}
    assert faults[findings.NO_BARRIER].count == N


def test_a_program_may_not_write_twice_without_a_barrier() -> None:
    assert not found(again, (2,), torch.zeros(32), BARRIER=True, OTHER=1.0, BLOCK=BLOCK)
    assert not found(again, (2,), torch.zeros(32), BARRIER=False, OTHER=0.0, BLOCK=BLOCK)
    faults = found(again, (2,), torch.zeros(32), BARRIER=False, OTHER=1.0, BLOCK=BLOCK)
    assert set(faults) == {findings.OVERWRITTEN}
    assert faults[findings.OVERWRITTEN].count == 32


def test_a_program_may_not_overtake_its_own_reads() -> None:
    assert not found(shift, (1,), torch.zeros(16), BY=0, BARRIER=False, BLOCK=BLOCK)
    assert not found(shift, (1,), torch.zeros(16), BY=1, BARRIER=True, BLOCK=BLOCK)
    faults = found(shift, (1,), torch.zeros(16), BY=1, BARRIER=False, BLOCK=BLOCK)
    assert set(faults) == {findings.TOO_EARLY}
    assert faults[findings.TOO_EARLY].count == 16


def run(order: Order, once: tuple[str, ...] = ()) -> list[float]:
    x, total = torch.zeros(4), torch.zeros(1)
    with instrumented(order, seed=1, once=once) as launches:
        running[(4,)](x, total)
    assert [launch.grid for launch in launches] == [(4,)]
    assert not launches[0].accesses  # nobody asked for them
    return [*x.tolist(), *total.tolist()]


def test_a_result_that_depends_on_the_order_is_another_one() -> None:
    assert run("forward") == [1.0, 3.0, 6.0, 10.0, 10.0]
    assert run("reversed") == [10.0, 9.0, 7.0, 4.0, 10.0]
    assert sorted(run("shuffled")[:4]) != run("forward")[:4]
    assert run("twice")[-1] == 20.0
    assert run("twice", once=("running",))[-1] == 10.0
    with pytest.raises(ValueError, match="order must be one of"):
        run("backwards")  # type: ignore[arg-type]


@triton.jit
def places(out_ptr, Y, Z):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size = tl.num_programs(0) * 10000 + tl.num_programs(1) * 100 + tl.num_programs(2)
    tl.store(out_ptr + (x * Y + y) * Z + z, size)


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled", "twice"])
def test_every_program_of_a_grid_runs_and_knows_its_place(order: Order) -> None:
    out, flat = torch.zeros(2, 3, 5, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    with instrumented(order):
        places[(2, 3, 5)](out, 3, 5)
        places[(2, 3)](flat, 3, 1)
    assert (out == 20305).all()
    assert (flat == 20301).all()


def test_the_interpreter_is_put_back() -> None:
    def state() -> list[object]:
        builder = interpreter.interpreter_builder
        return [interpreter.GridExecutor.__call__, dict(vars(builder), grid_idx=0, grid_dim=0)]

    places[(1,)](torch.zeros(1, dtype=torch.int32), 1, 1)
    before = state()
    with instrumented(log=True):
        places[(1,)](torch.zeros(1, dtype=torch.int32), 1, 1)
        assert state() != before
    assert state() == before
    with contextlib.suppress(KeyError), instrumented():
        raise KeyError
    assert state() == before


def test_elements_of_a_view_are_known() -> None:
    storage = torch.zeros(100, dtype=torch.int16)
    for view in (storage[3:50], storage[10:40:3], storage.view(10, 10)[2:5, 1:9].T, storage[:0]):
        start = storage.data_ptr()
        here = {int(view.data_ptr() - start) + 2 * int(i) for i in places_of(view)}
        addresses = np.arange(-10, 220) + start
        inside = findings.contains(view, addresses)
        assert set((addresses[inside] - start).tolist()) == here


def places_of(view: torch.Tensor) -> list[int]:
    """Offsets of the elements of a view, one by one."""
    offsets = [0] if view.numel() else []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        offsets = [at + i * stride for at in offsets for i in range(size)]
    return offsets
