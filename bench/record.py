"""A file of results: complete after every row, and taken up again by a later run of the same thing."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.harness import device_slug
from ocvtp.atomic import write_json

Row = dict[str, Any]
Rows = list[Row]


class ResultFile:
    """Rows below a head, in JSON.

    Rows of an earlier run stay where everything in the head but the date is as it was then, so that a run may
    be done in parts. A row replaces the one it repeats.

    Args:
        path: of the file, whose folder is made when it is written.
        head: what all rows have in common, ``commit`` among it.
        key: the fields of a row that say what it is.
        name: of the list of rows in the file.
        finish: makes of all rows those that are written.
        resume: whether to take up an earlier run's.
    """

    def __init__(
        self,
        path: Path,
        head: Row,
        key: Sequence[str],
        *,
        name: str = "rows",
        finish: Callable[[Rows], Rows] = lambda rows: rows,
        resume: bool = True,
    ) -> None:
        self.path, self._head, self._key, self._name, self._finish = path, head, tuple(key), name, finish
        self._rows = {self._id(row): row for row in (self._earlier() if resume else [])}

    @property
    def rows(self) -> Rows:
        """In the order they were measured, those of an earlier run first."""
        return list(self._rows.values())

    def has(self, row: Row) -> bool:
        """Whether there is a row of the same key."""
        return self._id(row) in self._rows

    def add(self, row: Row) -> None:
        """Add a row, or replace it, and write the file."""
        self._rows.pop(self._id(row), None)
        self._rows[self._id(row)] = row
        self._write()

    def drop(self, row: Row) -> None:
        """Forget a row about to be measured again: if that fails, it must have no figure."""
        if self._rows.pop(self._id(row), None) is not None:
            self._write()

    def _id(self, row: Row) -> str:
        return json.dumps([row[name] for name in self._key])

    def _earlier(self) -> Rows:
        if not self.path.exists():
            return []
        try:
            earlier = json.loads(self.path.read_text())
            head = {name: value for name, value in earlier.items() if name != self._name}
            same = {**head, "date": None} == json.loads(json.dumps({**self._head, "date": None}))
            # A tree with changes, or one unknown, is not the same as itself an hour ago.
            settled = not str(head["commit"]).endswith(("-dirty", "unknown"))
            return earlier[self._name] if same and settled else []
        except (ValueError, KeyError):
            return []

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self._head, self._name: self._finish(self.rows)})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a benchmark that records in parts: device, time, and where results go."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after this long")
    parser.add_argument("--record", action="store_true", help="write into RESULTS/<device>")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of this tree, where git can't tell")


def folder_of(arguments: argparse.Namespace) -> Path:
    """Of the device's results, by :func:`add_options`; a temporary one if nothing is to be recorded."""
    results = arguments.results if arguments.record else Path(tempfile.mkdtemp(prefix="ocvtp-bench-"))
    return results / device_slug(torch.device(arguments.device))


def exit_code(complete: bool, console: Console) -> int:
    """0, or 3 where ``--minutes`` ran out, which it says."""
    if complete:
        return 0
    console.print("time ran out: run it again for the rest")
    return 3
