"""Triton's interpreter, instrumented: in which order programs run, and a log of every access to memory.

    with instrumented("shuffled") as launches: ...       programs in another order
    with instrumented(log=True) as launches: ...         and, of each launch, what its programs read and wrote

The interpreter runs the programs of a launch one after another, in the order of their numbers, so it can't
show a race. The log can: two programs of a launch may run at any time, and may not meet at one address.
Everything is put back at the end, whatever happens inside.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

Order = Literal["forward", "reversed", "shuffled", "twice"]
READ, WRITE, ATOMIC = 0, 1, 2


class Access(NamedTuple):
    """One operation of one program on a block: the elements that its mask let through."""

    kind: int
    program: int  # in the order of the grid, whatever the order of running; or whose a Watch says it is
    epoch: int  # barriers that the program has passed
    size: int  # bytes of an element
    addresses: np.ndarray  # [n] int64
    lanes: np.ndarray  # [n] int32: where in the block
    values: np.ndarray | None  # [n] uint64: the bits that are written; None of reads and atomics


@dataclass
class Launch:
    """One launch. Tensors are held, so that addresses stay theirs."""

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, torch.Tensor]  # the views that were passed, by the kernel's names
    accesses: list[Access] = field(default_factory=list)


class Watch(Protocol):
    """Somebody who has a say in what atomics give, and whose an access is."""

    def owner(self, program: int) -> int:
        """Whose the next access of this program is."""

    def atomic(
        self, launch: Launch, epoch: int, pointers: Any, value: Any, sem: Any, run: Callable[[], Any]
    ) -> Any:
        """What an atomic gives, with ``run`` or without; None: it is a write like any other."""


def _in_order(order: Order, programs: int, once: bool, draw: random.Random) -> list[int]:
    """Numbers of programs, in the order in which they run."""
    numbers = list(range(programs))
    if order == "reversed":
        numbers.reverse()
    elif order == "twice" and not once:
        numbers *= 2
    if order in ("shuffled", "twice"):
        draw.shuffle(numbers)
    return numbers


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def log_into(accesses: list[Access], kind: int, pointers: Any, mask: Any, values: Any, *at: int) -> None:
    """Note an operation of the interpreter's; ``at``: who does it, and in which epoch."""
    shape = np.asarray(pointers.data).shape
    inside = np.broadcast_to(np.asarray(mask.data).astype(bool), shape).ravel()
    lanes = np.flatnonzero(inside).astype(np.int32)
    if not lanes.size:
        return
    written = None
    if values is not None:
        flat = np.ascontiguousarray(np.broadcast_to(np.asarray(values.data), shape)).ravel()[lanes]
        written = flat.view(f"u{flat.dtype.itemsize}").astype(np.uint64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = np.asarray(pointers.data).ravel()[lanes].astype(np.int64)
    accesses.append(Access(kind, *at, size, addresses, lanes, written))


@contextlib.contextmanager
def instrumented(
    order: Order = "forward",
    *,
    log: bool = False,
    seed: int = 0,
    once: Collection[str] = (),
    watch: Watch | None = None,
) -> Iterator[list[Launch]]:
    """Programs of every launch in this order; the launches so far.

    Args:
        order: ``"twice"`` shuffles, too, and every program comes two times.
        log: note accesses; else there are none in the launches.
        seed: of the shuffles.
        once: kernels whose programs come once all the same.
        watch: is asked about atomics, and about the owner of accesses.

    Raises:
        ValueError: there is no such order.
    """
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}; got {order!r}")
    builder = interpreter.interpreter_builder
    launches: list[Launch] = []
    draw = random.Random(seed)
    program, epoch = -1, 0
    queue: Iterator[int] = iter(())
    inside = False  # of a launch

    run = interpreter.GridExecutor.__call__
    place, measure, wait = builder.set_grid_idx, builder.set_grid_dim, builder.create_barrier
    originals = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal queue, inside
        assert not callable(executor.grid), "launchers of this package say their grid in numbers"
        grid = tuple(executor.grid)
        names = dict(zip(executor.arg_names, args), **kwargs)  # noqa: B905 (constexprs come by name)
        tensors = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
        launches.append(Launch(executor.fn.__name__, grid, tensors))
        programs = _in_order(order, math.prod(grid), executor.fn.__name__ in once, draw)
        queue, inside = iter(programs), True
        try:
            # The executor walks a line, and set_grid_idx below says which program that is.
            with mock.patch.object(executor, "grid", (len(programs),)):
                return run(executor, *args, **kwargs)
        finally:
            inside = False

    def set_grid_dim(*size: int) -> None:
        measure(*(_three(launches[-1].grid) if inside else size))

    def set_grid_idx(*index: int) -> None:
        nonlocal program, epoch
        if inside:
            program, epoch = next(queue), 0
            index = tuple(int(i) for i in np.unravel_index(program, _three(launches[-1].grid)))
        place(*index)

    def note(kind: int, pointers: Any, mask: Any, values: Any = None) -> None:
        if log and inside:
            owner = program if watch is None else watch.owner(program)
            log_into(launches[-1].accesses, kind, pointers, mask, values, owner, epoch)

    def create_masked_load(pointers: Any, mask: Any, *others: Any) -> Any:
        note(READ, pointers, mask)
        return originals["create_masked_load"](pointers, mask, *others)

    def create_masked_store(pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
        note(WRITE, pointers, mask, values)
        return originals["create_masked_store"](pointers, values, mask, *others)

    def create_atomic_rmw(op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        def run() -> Any:
            return originals["create_atomic_rmw"](op, pointers, value, mask, sem, scope)

        if watch is not None and inside:
            given = watch.atomic(launches[-1], epoch, pointers, value, sem, run)
            if given is not None:
                return given
        note(ATOMIC, pointers, mask)
        return run()

    def create_atomic_cas(pointers: Any, *others: Any) -> Any:
        note(ATOMIC, pointers, interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), None))
        return originals["create_atomic_cas"](pointers, *others)

    def create_barrier(*arguments: Any) -> Any:
        nonlocal epoch
        epoch += 1
        return wait(*arguments)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", call))
        for replacement in (
            set_grid_dim, set_grid_idx, create_masked_load, create_masked_store, create_atomic_rmw,
            create_atomic_cas, create_barrier,
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(builder, replacement.__name__, replacement))
        yield launches
