"""Where rows go: one JSON file for each family of operations, complete after every row."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.harness import device_slug, package_version, provenance
from bench.micro.ceilings import CEILINGS, Ceilings
from bench.micro.timing import l2_bytes

Row = dict[str, Any]
_KEY = ("op", "case", "shape", "dtype", "implementation", "mode")
_SMALL = "CPU: one image, small sizes, PyTorch alone, no floors; tells nothing about the kernels"


class Recorder:
    """Writes ``<folder>/<device>/micro-<family>.json``; without a folder, into a temporary one.

    Rows of an earlier run stay where everything but the date is as it was then, so that a run may be done in
    parts. A row replaces the one it repeats.
    """

    def __init__(self, folder: Path | None, device: torch.device, commit: str | None = None) -> None:
        self.device = device_slug(device)
        self._folder = folder
        self.ceilings = CEILINGS.get(self.device)
        self.note = _note(self.device, self.ceilings)
        self._head: Row = {
            **provenance(device, commit),
            **{
                peer.replace("-", "_"): found
                for peer in ("flash-colreduce", "flash-kmeans")
                if (found := package_version(peer))
            },
            "note": self.note,
            "l2_bytes": l2_bytes(device) or None,
            "ceilings": self.ceilings.to_dict() if self.ceilings else None,
        }
        self._rows: dict[str, dict[str, Row]] = {}

    @property
    def folder(self) -> Path:
        """Of this device's files."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ocvtp-micro-"))
        return self._folder / self.device

    def rows(self, family: str) -> list[Row]:
        """Of one file, in the order they were measured, those of an earlier run first."""
        return list(self._of(family).values())

    def families(self) -> list[str]:
        """What was measured."""
        return list(self._rows)

    def add(self, family: str, row: Row) -> None:
        """Add a row, or replace it, and write the file."""
        rows = self._of(family)
        rows.pop(_key(row), None)
        rows[_key(row)] = row
        self._write(family)

    def drop(self, family: str, row: Row) -> None:
        """Forget a row about to be measured again: if that fails, it must have no figure."""
        if self._of(family).pop(_key(row), None) is not None:
            self._write(family)

    def _of(self, family: str) -> dict[str, Row]:
        if family not in self._rows:
            self._rows[family] = {_key(row): row for row in self._earlier(family)}
        return self._rows[family]

    def _earlier(self, family: str) -> list[Row]:
        if self._folder is None or not (path := self._path(family)).exists():
            return []
        try:
            earlier = json.loads(path.read_text())
            head = {name: value for name, value in earlier.items() if name != "rows"}
            same = {**head, "date": None} == json.loads(json.dumps({**self._head, "date": None}))
            # A tree with changes, or one unknown, is not the same as itself an hour ago.
            settled = not str(head["commit"]).endswith(("-dirty", "unknown"))
            return earlier["rows"] if same and settled else []
        except (ValueError, KeyError):
            return []

    def _path(self, family: str) -> Path:
        return self.folder / f"micro-{family}.json"

    def _write(self, family: str) -> None:
        rows = with_speedups(self.rows(family))
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps({**self._head, "rows": rows}, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, self._path(family))


def _note(device: str, ceilings: Ceilings | None) -> str | None:
    """What a reader of all rows must know."""
    if device.startswith("cpu-"):
        return _SMALL
    return None if ceilings else f"no floors: {device} is not in bench/micro/ceilings.py"


def with_speedups(rows: list[Row]) -> list[Row]:
    """Ours with their speed-up over each baseline, graph against graph and eager against eager.

    The reference, which is what this package runs without a GPU, too.
    """
    return [{**row, "speedup_over": _speedups(row, rows)} if _is_ours(row) else row for row in rows]


def _speedups(row: Row, rows: list[Row]) -> dict[str, float]:
    setting = [row[name] for name in _KEY if name != "implementation"]
    return {
        other["implementation"]: other["median_us"] / row["median_us"]
        for other in rows
        if not str(other["implementation"]).startswith("ours")
        and other["implementation"] != row["implementation"]
        and [other[name] for name in _KEY if name != "implementation"] == setting
    }


def _is_ours(row: Row) -> bool:
    return str(row["implementation"]).startswith(("ours", "reference"))


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in _KEY])
