"""Where rows go: one JSON file for each family of operations, complete after every row."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench.harness import device_slug, package_version, provenance
from bench.micro.ceilings import CEILINGS, Ceilings
from bench.micro.timing import l2_bytes
from bench.record import ResultFile, Row, Rows

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
        self._files: dict[str, ResultFile] = {}

    @property
    def folder(self) -> Path:
        """Of this device's files."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ocvtp-micro-"))
        return self._folder / self.device

    def rows(self, family: str) -> Rows:
        """Of one file, in the order they were measured, those of an earlier run first."""
        return self._file(family).rows

    def families(self) -> list[str]:
        """What was measured."""
        return list(self._files)

    def add(self, family: str, row: Row) -> None:
        """Add a row, or replace it, and write the file."""
        self._file(family).add(row)

    def drop(self, family: str, row: Row) -> None:
        """Forget a row about to be measured again: if that fails, it must have no figure."""
        self._file(family).drop(row)

    def _file(self, family: str) -> ResultFile:
        if family not in self._files:
            resume = self._folder is not None
            self._files[family] = ResultFile(
                self.folder / f"micro-{family}.json", self._head, _KEY, finish=with_speedups, resume=resume
            )
        return self._files[family]


def _note(device: str, ceilings: Ceilings | None) -> str | None:
    """What a reader of all rows must know."""
    if device.startswith("cpu-"):
        return _SMALL
    return None if ceilings else f"no floors: {device} is not in bench/micro/ceilings.py"


def with_speedups(rows: Rows) -> Rows:
    """Ours with their speed-up over each baseline, graph against graph and eager against eager.

    The reference, which is what this package runs without a GPU, too.
    """
    return [{**row, "speedup_over": _speedups(row, rows)} if _is_ours(row) else row for row in rows]


def _speedups(row: Row, rows: Rows) -> dict[str, float]:
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
