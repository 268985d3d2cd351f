"""What a run measures, as it goes: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ocvtp.atomic import write_atomic
from ocvtp.stored.fields import Within
from ocvtp.stored.refused import Refused

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Rows:
    """How much of ``metrics.jsonl`` belongs to a state.

    Attributes:
        size: bytes.
        sha256: of these bytes.
    """

    size: Annotated[int, Within(0, 2**62)] = 0
    sha256: str = hashlib.sha256().hexdigest()


def read_rows(folder: Path, rows: Rows) -> bytes:
    """The beginning of ``metrics.jsonl`` that ``rows`` speaks of; what follows is of a run that died.

    Raises:
        Refused: it is not there, or not what was written.
    """
    if not rows.size:
        return b""
    path = folder / METRICS
    if not path.is_file():
        raise Refused("it is no file" if path.exists() else "it is missing")
    try:
        with path.open("rb") as file:
            kept = file.read(min(rows.size, path.stat().st_size))
    except OSError as error:
        raise Refused(f"it can't be read ({error.strerror})") from error
    if len(kept) < rows.size:
        raise Refused(f"it is cut off after {len(kept)} bytes, {rows.size} were written")
    if hashlib.sha256(kept).hexdigest() != rows.sha256:
        raise Refused("its rows are not what was written: changed or damaged")
    return kept


class MetricsLog:
    """Rows of numbers in ``metrics.jsonl`` and TensorBoard's event files.

    Args:
        folder: of the run.
        step: steps done.
        rows: that belong to them. Those beyond are of a run that died, and are done again: they are dropped.

    Raises:
        Refused: see :func:`read_rows`.
    """

    def __init__(self, folder: Path, step: int, rows: Rows) -> None:
        kept = read_rows(folder, rows)
        path = folder / METRICS
        write_atomic(path, lambda partial: partial.write_bytes(kept))
        self._size, self._digest = len(kept), hashlib.sha256(kept)
        self._file = path.open("ab")
        self._board = _summary_writer(folder / TENSORBOARD, step)

    @property
    def rows(self) -> Rows:
        """All that was written so far."""
        return Rows(self._size, self._digest.hexdigest())

    def write(self, kind: str, row: Mapping[str, float | None]) -> None:
        """One row with its ``step``; ``kind`` is ``"train"`` or ``"validation"``. ``None`` was not finite."""
        line = (json.dumps({"kind": kind, **row}) + "\n").encode()
        self._file.write(line)
        self._digest.update(line)
        self._size += len(line)
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
