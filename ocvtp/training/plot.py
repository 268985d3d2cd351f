"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

from ocvtp.atomic import write_atomic
from ocvtp.training.log import read_metrics

PLOT = "loss.png"
_POINTS = 200  # of the training loss; each the mean of what lies between two of them


def plot_loss(folder: Path) -> bool:
    """Draw training and validation loss against steps; ``False`` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in read_metrics(folder) if row["loss"] is not None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("train", "-"), ("validation", "o-")):
        points = [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]
        if points:
            steps, losses = zip(*(_thinned(points) if kind == "train" else points), strict=True)
            axes.plot(steps, losses, style, label=kind, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="area-weighted reconstruction error", yscale="log")
    if rows:
        axes.legend()
    write_atomic(folder / PLOT, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    return True


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(step for step, _ in group) / len(group), sum(loss for _, loss in group) / len(group))
        for group in groups
    ]
