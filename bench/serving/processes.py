"""CPU time of a process and of all below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class _Process(NamedTuple):
    number: int
    parent: int
    ticks: int


def cpu_seconds(root: int, proc: Path = PROC) -> float:
    """Seconds that a process and its descendants have spent computing, in their own code and the kernel's.

    What a machine shared with others blurs least. Of processes that have ended nothing is counted.

    Args:
        root: number of the process at the top.
        proc: Linux's folder of processes.

    Raises:
        ProcessLookupError: there is no such process.
    """
    found = {one.number: one for one in _processes(proc)}
    if root not in found:
        raise ProcessLookupError(f"there is no process {root}")
    children: dict[int, list[_Process]] = {}
    for one in found.values():
        children.setdefault(one.parent, []).append(one)
    ticks, open_ = 0, [found[root]]
    while open_:
        one = open_.pop()
        ticks += one.ticks
        open_ += children.get(one.number, [])
    return ticks / os.sysconf("SC_CLK_TCK")


def _processes(proc: Path) -> Iterator[_Process]:
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        yield _process(text)


def _process(stat: str) -> _Process:
    """From the text of ``/proc/<pid>/stat``. The name, in parentheses, may hold anything."""
    number = int(stat.split(" ", 1)[0])
    fields = stat.rsplit(")", 1)[1].split()
    return _Process(number, int(fields[1]), int(fields[11]) + int(fields[12]))
