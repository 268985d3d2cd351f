"""What a run measured, as it goes: JSON lines, TensorBoard where it is installed, a plot of the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ocvtp.atomic import write_atomic

METRICS = "metrics.jsonl"
PLOT = "loss.png"
_TENSORBOARD = "tensorboard"


class MetricsLog:
    """Rows of numbers, each of a step, in ``metrics.jsonl`` and TensorBoard's event files.

    Args:
        folder: of the run.
        step: steps done. Rows beyond it are of a run that died, and are done again: they are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        self._keep_until(step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _summary_writer(folder / _TENSORBOARD, step)

    @property
    def has_board(self) -> bool:
        """Whether TensorBoard is installed."""
        return self._board is not None

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One row; ``kind`` is ``"train"`` or ``"validation"``."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Everything to the disk."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [row for row in read_metrics(self._path.parent) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomic(self._path, lambda partial: partial.write_text(text))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line that was cut off is left out."""
    rows = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_loss(folder: Path) -> None:
    """Draw training and validation loss against steps, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_metrics(folder)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("train", "-"), ("validation", "o-")):
        points = [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=kind, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="area-weighted reconstruction error", yscale="log")
    axes.legend()
    write_atomic(folder / PLOT, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
