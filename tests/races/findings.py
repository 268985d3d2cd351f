"""What may not happen between two barriers, between two programs, and outside of the tensors.

A log of one launch (``instrument.py``) is searched for

* accesses to what is no element of a view that was passed, of the size of its elements: stricter than the
  storage, which is what a GPU's own checks and guards around buffers see;
* addresses that several programs write, or that one writes and another reads: nothing orders them;
* in one program, what was written since the last barrier and is read, or is written with other bits: other
  threads may be meant, and they need not have got so far; and what was read and is then written from another
  place of a block.

Atomics count as writes of unknown bits: which comes last is chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tests.races.instrument import ATOMIC, READ, WRITE, Access, Launch

READ_OUTSIDE = "reads outside of every view"
WRITTEN_OUTSIDE = "writes outside of every view"
TWO_WRITERS = "several programs write different bits"
SAME_BITS = "several programs write the same bits"
FOREIGN = "a program reads what another writes"
NO_BARRIER = "a program reads what it has written, no barrier between"
OVERWRITTEN = "a program writes twice, other bits, no barrier between"
TOO_EARLY = "a program writes what another of its threads reads, no barrier between"


class Finding(NamedTuple):
    """What was found of one launch."""

    kernel: str
    kind: str
    count: int  # of accesses or addresses
    example: str


class Rows(NamedTuple):
    """Accesses, one for each element, in the order of time."""

    address: np.ndarray  # int64
    kind: np.ndarray  # int8
    program: np.ndarray  # int64
    epoch: np.ndarray  # int64
    lane: np.ndarray  # int64
    value: np.ndarray  # uint64


def analyse(launch: Launch) -> list[Finding]:
    """Everything that is wrong with a launch; ``SAME_BITS``, too, which a kernel may be allowed."""
    found = outside(launch)
    rows = touched_by_writes(launch.accesses)
    if rows.address.size:
        found += _between_programs(launch, rows) + within_programs(launch, rows)
    return found


def contains(view: torch.Tensor, addresses: np.ndarray) -> np.ndarray:
    """Which ``addresses`` are elements of ``view``, bool."""
    if view.numel() == 0:
        return np.zeros(addresses.shape, dtype=bool)
    step = view.element_size()
    offset, misplaced = np.divmod(addresses - view.data_ptr(), step)
    if view.is_contiguous():
        return (misplaced == 0) & (offset >= 0) & (offset < view.numel())
    places = np.zeros(1, dtype=np.int64)
    for size, stride in zip(view.shape, view.stride(), strict=True):
        places = np.add.outer(places, np.arange(size, dtype=np.int64) * stride).ravel()
    return (misplaced == 0) & np.isin(offset, places)


def touched_by_writes(accesses: list[Access]) -> Rows:
    """Elements that somebody writes, whoever touches them: the others can't be wrong."""
    writes = [access.addresses for access in accesses if access.kind != READ]
    written = np.unique(np.concatenate(writes)) if writes else np.zeros(0, dtype=np.int64)
    parts: list[tuple[Access, np.ndarray]] = []
    for access in accesses:
        places = slice(None) if access.kind != READ else _places(access.addresses, written)
        if written.size and access.addresses[places].size:
            parts.append((access, np.arange(access.addresses.size)[places]))

    def column(of: str, dtype: type) -> np.ndarray:
        values = [_column(access, of, places) for access, places in parts]
        return np.concatenate(values).astype(dtype) if values else np.zeros(0, dtype=dtype)

    return Rows(
        column("addresses", np.int64),
        column("kind", np.int8),
        column("program", np.int64),
        column("epoch", np.int64),
        column("lanes", np.int64),
        column("values", np.uint64),
    )


def _column(access: Access, of: str, places: np.ndarray) -> np.ndarray:
    value = getattr(access, of)
    if value is None:
        return np.zeros(places.size, dtype=np.uint64)
    return value[places] if isinstance(value, np.ndarray) else np.full(places.size, value)


def _places(addresses: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Which ``addresses`` are among the sorted ``written``, bool."""
    if not written.size or addresses.max() < written[0] or addresses.min() > written[-1]:
        return np.zeros(addresses.shape, dtype=bool)
    nearest = np.minimum(np.searchsorted(written, addresses), written.size - 1)
    return written[nearest] == addresses


def outside(launch: Launch) -> list[Finding]:
    """Accesses to no element of a view."""
    strays: dict[str, list[tuple[int, int]]] = {READ_OUTSIDE: [], WRITTEN_OUTSIDE: []}
    for size in {access.size for access in launch.accesses}:
        same = [access for access in launch.accesses if access.size == size]
        addresses = np.concatenate([access.addresses for access in same])
        missing, where = np.unique(addresses, return_inverse=True)
        inside = np.zeros(missing.shape, dtype=bool)
        for view in launch.tensors.values():
            if view.element_size() == size:
                inside |= contains(view, missing)
        if inside.all():
            continue
        program = np.repeat([access.program for access in same], [access.addresses.size for access in same])
        reads = np.repeat(
            [access.kind == READ for access in same], [access.addresses.size for access in same]
        )
        stray = ~inside[where.ravel()]
        for kind, chosen in ((READ_OUTSIDE, stray & reads), (WRITTEN_OUTSIDE, stray & ~reads)):
            strays[kind] += zip(program[chosen].tolist(), addresses[chosen].tolist(), strict=True)
    return [
        Finding(launch.kernel, kind, len(found), f"program {found[0][0]}, {place(launch, found[0][1])}")
        for kind, found in strays.items()
        if found
    ]


def _between_programs(launch: Launch, rows: Rows) -> list[Finding]:
    order = np.lexsort((rows.program, rows.address))  # stable, so in time within a program
    rows = Rows(*(column[order] for column in rows))
    first = starts_of(rows.address)
    group = np.cumsum(first) - 1
    starts = np.flatnonzero(first)
    writes = rows.kind != READ
    least = np.minimum.reduceat(np.where(writes, rows.program, np.iinfo(np.int64).max), starts)
    most = np.maximum.reduceat(np.where(writes, rows.program, -1), starts)
    several = least != most
    # Of writes: the bits of each address's lowest and highest; reads repeat what is there anyway.
    low = np.minimum.reduceat(np.where(writes, rows.value, np.iinfo(np.uint64).max), starts)
    high = np.maximum.reduceat(np.where(writes, rows.value, 0), starts)
    alike = (low == high) & ~np.logical_or.reduceat(rows.kind == ATOMIC, starts)
    # A program that reads what it has written itself gets that, if everybody writes the same there.
    own = starts_of(rows.address, rows.program)
    before = np.cumsum(writes) - writes
    wrote = before > before[np.maximum.accumulate(np.where(own, np.arange(own.size), 0))]
    theirs = (least[group] != rows.program) | (most[group] != rows.program)
    foreign = ~writes & theirs & ~(alike[group] & wrote)
    found = []
    for kind, chosen in (
        (TWO_WRITERS, first & (several & ~alike)[group]),
        (SAME_BITS, first & (several & alike)[group]),
        (FOREIGN, foreign),
    ):
        if chosen.any():
            at = np.flatnonzero(chosen)[0]
            programs = sorted(set(rows.program[group == group[at]].tolist()))
            example = f"programs {programs[:4]}, {place(launch, int(rows.address[at]))}"
            found.append(Finding(launch.kernel, kind, int(chosen.sum()), example))
    return found


def within_programs(launch: Launch, rows: Rows) -> list[Finding]:
    """What threads of one program do to each other."""
    order = np.lexsort((rows.program, rows.address))
    rows = Rows(*(column[order] for column in rows))
    own = starts_of(rows.address, rows.program)
    index = np.arange(own.size)
    start = np.maximum.accumulate(np.where(own, index, 0))
    writes = rows.kind == WRITE
    reads = rows.kind == READ
    # The last write before each row, and the next one after it, of the same program to the same address.
    last = np.maximum.accumulate(np.where(writes, index, -1))
    last = np.concatenate(([-1], last[:-1]))
    has_last = last >= start
    since = has_last & (rows.epoch[last] == rows.epoch)
    following = np.minimum.accumulate(np.where(writes, index, own.size)[::-1])[::-1]
    following = np.concatenate((following[1:], [own.size]))
    later = np.minimum(following, own.size - 1)
    soon = (following < own.size) & (start[later] == start) & (rows.epoch[later] == rows.epoch)
    elsewhere = rows.lane[later] != rows.lane
    found = []
    for kind, chosen in (
        (NO_BARRIER, reads & since),
        (OVERWRITTEN, writes & since & (rows.value[last] != rows.value)),
        (TOO_EARLY, reads & soon & elsewhere),
    ):
        if chosen.any():
            at = np.flatnonzero(chosen)[0]
            example = f"program {rows.program[at]}, {place(launch, int(rows.address[at]))}"
            found.append(Finding(launch.kernel, kind, int(chosen.sum()), example))
    return found


def starts_of(*keys: np.ndarray) -> np.ndarray:
    """Where a sorted key changes, bool; the first row, too."""
    changes = np.zeros(keys[0].size, dtype=bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return changes


def place(launch: Launch, address: int) -> str:
    """An address in words: the element of the view that begins last at or before it."""
    begun = [(view.data_ptr(), name, view) for name, view in launch.tensors.items() if view.numel()]
    before = [entry for entry in begun if entry[0] <= address]
    if not before:
        return "before all views"
    start, name, view = max(before, key=lambda entry: entry[0])
    return f"element {(address - start) // view.element_size()} from the start of {name}"
