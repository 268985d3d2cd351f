"""What a run measures, as it goes: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ocvtp.atomic import write_atomic

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Rows of numbers in ``metrics.jsonl`` and TensorBoard's event files.

    Args:
        folder: of the run.
        step: steps done. Rows beyond it are of a run that died, and are done again: they are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / METRICS
        if path.exists():
            text = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
            write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(folder / TENSORBOARD, step)

    def write(self, kind: str, row: Mapping[str, float | None]) -> None:
        """One row with its ``step``; ``kind`` is ``"train"`` or ``"validation"``. ``None`` was not finite."""
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        if self._board is None:
            return
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, row["step"])

    def sync(self) -> None:
        """Everything so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Everything to the disk, and no more."""
        self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line that was cut off is left out."""
    rows = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
