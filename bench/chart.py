"""Lines against the budget, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

#: Colours that colour-blind people tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c8c3c", "#783ca0")


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]  # name -> points, x ascending


def chart(panels: Sequence[Panel], x_label: str, y_label: str, x_ticks: Sequence[float]) -> Figure:
    """Panels side by side, one legend below; a name has the same colour in all of them.

    Raises:
        ValueError: more names than colours.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    if len(names) > len(_COLOURS):
        raise ValueError(f"{len(names)} lines could not be told apart; there are {len(_COLOURS)} colours")
    figure = Figure(figsize=(5.2 * len(panels), 4.6), dpi=110, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, line in panel.lines.items():
            colour = _COLOURS[names.index(name)]
            axes.plot(*zip(*line, strict=True), "o-", color=colour, label=name, markersize=4, linewidth=1.8)
        axes.set(title=panel.title, xlabel=x_label, ylabel=y_label, xticks=list(x_ticks))
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure
