"""Tasks of one launch, handed out by tickets and ordered by counters: is every meeting at an address ordered?

A kernel of this kind keeps counters in a tensor of int32, zero at the start. A program takes the next ticket,
an ``atomic_add`` of 1 to the word of tickets, and does the task that this ticket stands for; it ends when
there are no more, and may say so at a word for those who left. Other words order tasks:

* a wait is ``atomic_add(word, 0, sem="acquire")`` until the word is large enough,
* a signal is ``atomic_add(word, 1, sem="release")`` when the task is done.

Which program does a task, and when, is chance, so nothing counts but waits and signals. A wait here is first
told 0, then 1, and so on: the number that it is content with is the number it waits for, however many signals
there are by then. (Two waits for one word with no access between them would count as one.) A task is before
another if that one could never begin were the first one never done; with acquire and release all along the
way, what the first one wrote can be read by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.runtime import interpreter

from tests.races import findings
from tests.races.findings import Finding, Rows
from tests.races.instrument import READ, Access, Launch

TICKET, LEFT = 0, 1

UNORDERED = "two tasks meet at an address, and nothing orders them"
EARLY = "a task touches what others write before it has waited, or without a barrier since"
LATE = "a task touches what others see after its signal, or without a barrier before it"
RELAXED = "a wait that does not acquire, or a signal that does not release"
ELSEWHERE = "a program touches, outside of its tasks, what is written"
_NOBODY = -1


class StuckError(RuntimeError):
    """A task waits for what only a task with a higher ticket, or nobody, would do."""


class Mark(NamedTuple):
    """A wait or a signal."""

    task: int
    word: int
    want: int  # of a wait: the least number it is content with
    epoch: int
    position: int  # accesses that were logged before
    strict: bool  # whether it acquires, or releases


class Tickets:
    """What ``instrumented(log=True, watch=...)`` asks; one launch of one kernel."""

    def __init__(
        self, sync: torch.Tensor, tasks: int, *, ticket: int = TICKET, left: int | None = LEFT
    ) -> None:
        """
        Args:
            sync: int32, the words. All of them must be zero.
            tasks: how many tickets there are.
            ticket: the word of tickets.
            left: the word for those who left, if there is one.
        """
        if sync.dtype != torch.int32 or not sync.is_contiguous() or bool(sync.any()):
            raise ValueError("sync must be contiguous int32, all zeros")
        self.sync, self.tasks = sync, tasks
        self._ticket, self._left = ticket, left
        self.waits: list[Mark] = []
        self.signals: list[Mark] = []
        self._task = _NOBODY
        self._waiting: tuple[int, int] | None = None  # task and word of the wait that goes on

    def owner(self, program: int) -> int:
        """The task that runs, whoever runs it."""
        self._waiting = None
        return self._task

    def atomic(
        self, launch: Launch, epoch: int, pointers: Any, value: Any, sem: Any, run: Callable[[], Any]
    ) -> Any:
        """Tickets, waits and signals; None if the address is none of the words.

        Raises:
            StuckError: a wait that nobody can end.
            ValueError: an atomic that is none of these.
        """
        addresses, values = np.asarray(pointers.data).ravel(), np.asarray(value.data).ravel()
        words = (addresses.astype(np.int64) - self.sync.data_ptr()) // self.sync.element_size()
        if not ((words >= 0) & (words < self.sync.numel())).all():
            return None
        if words.size != 1 or values[0] not in (0, 1):
            raise ValueError("an atomic on the words must add 0 or 1 to one of them")
        word, at = int(words[0]), (epoch, len(launch.accesses))
        if word == self._left:
            self._task = _NOBODY
            return run()
        if word == self._ticket:
            given = run()
            number = int(np.asarray(given.data).ravel()[0])
            self._task = number if number < self.tasks else _NOBODY
            return given
        if self._task == _NOBODY:
            raise ValueError("a wait or a signal outside of a task")
        if values[0] == 1:
            self._waiting = None
            self.signals.append(Mark(self._task, word, 0, *at, sem in _releases()))
            return run()
        return self._wait(word, at, sem in _acquires(), run())

    def _wait(self, word: int, at: tuple[int, int], strict: bool, real: Any) -> Any:
        """The next number, from zero, as long as it is true."""
        if self._waiting == (self._task, word):
            last = self.waits.pop()
            told = last.want + 1
            strict &= last.strict
        else:
            told = 0
            self._waiting = (self._task, word)
        there = int(np.asarray(real.data).ravel()[0])
        if told > there:
            raise StuckError(f"task {self._task} waits for more than {there} at word {word}")
        self.waits.append(Mark(self._task, word, told, *at, strict))
        return interpreter.TensorHandle(np.full_like(real.data, told), real.dtype)

    def order(self) -> np.ndarray:
        """``[first, then]`` bool: the second task can't begin before the first is done."""
        words = self.sync.numel()
        adds = np.zeros((self.tasks, words), dtype=np.int64)
        np.add.at(adds, ([mark.task for mark in self.signals], [mark.word for mark in self.signals]), 1)
        waits = sorted(mark for mark in self.waits if mark.want > 0)
        task, word, want = (np.array([mark[i] for mark in waits], dtype=np.int64) for i in range(3))
        begins = np.flatnonzero(np.r_[True, task[1:] != task[:-1]]) if task.size else task
        # Row by row: what gets done if this one task never is.
        done = np.zeros((self.tasks, self.tasks), dtype=bool)
        while True:
            ready = np.ones_like(done)
            if task.size:
                enough = (done.astype(np.int64) @ adds)[:, word] >= want
                ready[:, task[begins]] = np.logical_and.reduceat(enough, begins, axis=1)
            np.fill_diagonal(ready, False)
            if (ready == done).all():
                break
            done = ready
        before = ~done
        np.fill_diagonal(before, False)
        return before


class Checked(NamedTuple):
    """What was found, and how much there was to look at. Tasks are called by their tickets."""

    findings: list[Finding]
    pairs: int  # of tasks that meet at some address


def analyse(launch: Launch, tickets: Tickets) -> Checked:
    """Everything that is wrong with a launch of tasks; see also :func:`tests.races.findings.analyse`."""
    found = findings.outside(launch)
    if not all(mark.strict for mark in tickets.waits + tickets.signals):
        loose = [mark for mark in tickets.waits + tickets.signals if not mark.strict]
        found.append(
            Finding(launch.kernel, RELAXED, len(loose), f"task {loose[0].task}, word {loose[0].word}")
        )
    accesses, positions = _without_words(launch.accesses, tickets.sync)
    rows = findings.touched_by_writes(accesses)
    if not rows.address.size:
        return Checked(found, 0)
    found += findings.within_programs(launch, rows)
    shared, pairs, unordered = _meetings(launch, rows, tickets.order())
    found += unordered
    for kind, bad in _misplaced(accesses, positions, shared, tickets).items():
        task, address = bad[0]
        where = findings.place(launch, address)
        found.append(Finding(launch.kernel, kind, len(bad), f"task {task}, {where}"))
    return Checked(found, pairs)


def _without_words(accesses: list[Access], sync: torch.Tensor) -> tuple[list[Access], list[int]]:
    """Accesses to anything but the words, and their positions in the log."""
    first, last = sync.data_ptr(), sync.data_ptr() + sync.numel() * sync.element_size()
    kept, positions = [], []
    for position, access in enumerate(accesses):
        outside = (access.addresses < first) | (access.addresses >= last)
        if outside.any():
            values = None if access.values is None else access.values[outside]
            kept.append(
                access._replace(
                    addresses=access.addresses[outside], lanes=access.lanes[outside], values=values
                )
            )
            positions.append(position)
    return kept, positions


def _meetings(launch: Launch, rows: Rows, before: np.ndarray) -> tuple[np.ndarray, int, list[Finding]]:
    """Addresses at which tasks meet, sorted; pairs of tasks that do; and what is not ordered."""
    real = rows.program != _NOBODY
    key = rows.program[real] * 2 + (rows.kind[real] != READ)
    meeting = np.unique(np.stack((rows.address[real], key), axis=1), axis=0)
    address, key = meeting[:, 0], meeting[:, 1]
    starts = np.flatnonzero(findings.starts_of(address))
    ends = np.append(starts[1:], address.size)
    several = key[starts] // 2 != key[ends - 1] // 2
    # Addresses where the same tasks do the same have one number.
    number = np.random.default_rng(0).integers(0, 2**63, 2 * before.shape[0], dtype=np.uint64)
    company = np.add.reduceat(number[key], starts)
    _, which, times = np.unique(company[several], return_index=True, return_counts=True)
    pairs: set[tuple[int, int]] = set()
    bad, example = 0, ""
    for group, count in zip(np.flatnonzero(several)[which], times, strict=True):
        tasks, writes = np.divmod(key[starts[group] : ends[group]], 2)
        meets = (writes[:, None] | writes[None, :]).astype(bool) & (tasks[:, None] < tasks[None, :])
        pairs |= {(int(tasks[i]), int(tasks[j])) for i, j in zip(*np.nonzero(meets), strict=True)}
        ordered = before[tasks[:, None], tasks[None, :]] | before[tasks[None, :], tasks[:, None]]
        loose = np.argwhere(meets & ~ordered)
        if loose.size:
            bad += int(count)
            first, second = (int(tasks[i]) for i in loose[0])
            example = example or f"tasks {first} and {second}, " + findings.place(
                launch, address[starts[group]]
            )
    found = [Finding(launch.kernel, UNORDERED, bad, example)] if bad else []
    return address[starts[several]], len(pairs), found


def _misplaced(
    accesses: list[Access], positions: list[int], shared: np.ndarray, tickets: Tickets
) -> dict[str, list[tuple[int, int]]]:
    """Accesses between which and their task's waits or signals no barrier is, as (task, address)."""
    waits: dict[int, list[Mark]] = {}
    signals: dict[int, list[Mark]] = {}
    for marks, by_task in ((tickets.waits, waits), (tickets.signals, signals)):
        for mark in marks:
            by_task.setdefault(mark.task, []).append(mark)
    found: dict[str, list[tuple[int, int]]] = {}
    written = np.unique(np.concatenate([a.addresses for a in accesses if a.kind != READ]))
    for access, position in zip(accesses, positions, strict=True):
        task = access.program
        if task == _NOBODY:
            if (touched := access.addresses[np.isin(access.addresses, written)]).size:
                found.setdefault(ELSEWHERE, []).append((task, int(touched[0])))
            continue
        early = any(m.position > position or m.epoch == access.epoch for m in waits.get(task, ()))
        late = any(m.position <= position or m.epoch == access.epoch for m in signals.get(task, ()))
        if early or late:
            touched = access.addresses[np.isin(access.addresses, shared)]
            for kind, true in ((EARLY, early), (LATE, late)):
                if true and touched.size:
                    found.setdefault(kind, []).append((task, int(touched[0])))
    return found


def _acquires() -> tuple[Any, ...]:
    return _semantics("ACQUIRE")


def _releases() -> tuple[Any, ...]:
    return _semantics("RELEASE")


def _semantics(name: str) -> tuple[Any, ...]:
    kinds = interpreter._ir.MEM_SEMANTIC
    return getattr(kinds, name), kinds.ACQUIRE_RELEASE
