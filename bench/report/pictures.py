"""Pictures. Each remembers what it was drawn from, so that it can be checked without looking at pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from bench.chart import Panel, chart
from bench.report.kernels import FAMILIES, with_floors
from bench.report.published import FIGURE_1, FIGURE_3
from bench.report.results import Results

_KEY = "ocvtp-data"
Data = Any
Drawing = tuple[Callable[[Results], Data], Callable[[Data], Figure]]


def flops_data(results: Results) -> Data:
    """Model -> line -> ``[tokens, TFLOP]``: the paper's Figure 1 on the right, and ours."""
    result = results.one("flops")
    if result is None:
        return None
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for name in ("llava-1.5-7b", "llava-next-7b"):
        rows = [row for row in result.data["models"].values() if row["model"] == name]
        rows.sort(key=lambda row: row["keep"])
        panels[name] = {
            "paper's accounting": [[row["keep"], row["paper"]["pruned_tflops"]] for row in rows],
            "language model": [[r["keep"], r["full"]["pruned"]["prefill"]] for r in rows],
            "to the first token": [[r["keep"], r["full"]["pruned"]["first_token"]] for r in rows],
        }
        if name in FIGURE_1:
            panels[name]["printed"] = [list(one) for one in sorted(FIGURE_1[name].items())]
    return panels


def draw_flops(data: Data) -> Figure:
    """Side by side, one panel for each model."""
    panels = [
        Panel(name, {label: [(x, y) for x, y in line] for label, line in lines.items()})
        for name, lines in data.items()
    ]
    figure = chart(panels, "image tokens kept", "TFLOP", [])
    for axes, lines in zip(figure.axes, data.values(), strict=True):
        axes.set_xticks([x for x, _ in next(iter(lines.values()))][1::2])
        axes.set_ylim(bottom=0)
    return figure


def methods_data(results: Results) -> Data:
    """Model -> method -> ``[budget, TFLOP to the first token]``: the paper's Figure 1 with every method."""
    result = results.one("flops_rivals")
    if result is None:
        return None
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for row in result.data["models"].values():
        if "tflops" in row:
            points = panels.setdefault(row["model"], {}).setdefault(row["method"], [])
            points.append([row["keep"], row["tflops"]["first_token"]])
    return panels


def draw_methods(data: Data) -> Figure:
    """A row for every method, a dot for every budget; panels have axes of their own."""
    figure = Figure(figsize=(4.4 * len(data), 4.6), dpi=110, layout="constrained")
    names = list(dict.fromkeys(name for lines in data.values() for name in lines))[::-1]
    colours = ("#0072b2", "#d55e00", "#009e73")
    for axes, (model, lines) in zip(
        figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True
    ):
        budgets = sorted({keep for points in lines.values() for keep, _ in points}, reverse=True)
        for keep, colour in zip(budgets, colours, strict=True):
            found = [
                (tflop, names.index(name))
                for name, points in lines.items()
                for k, tflop in points
                if k == keep
            ]
            label = f"{keep:g} tokens" if keep > 1 else f"{100 * keep:.1f} %"
            axes.plot(*zip(*found, strict=True), "o", color=colour, label=label, markersize=5)
        axes.set(title=model, xlabel="TFLOP to the first token", xlim=(0, None))
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8)
    return figure


def time_data(results: Results) -> Data:
    """Where measured -> method -> ms: the paper's Figure 3, and ours."""
    groups: dict[str, dict[str, float]] = {}
    for one in FIGURE_3:
        groups.setdefault(f"{one.model}\n{one.device}", {})[f"{one.method} ({one.tokens})"] = one.ms
    for result in results.all:
        if result.name.startswith("e2e-"):
            rows = [row for row in result.data["rows"] if (row["mode"], row["batch"]) == ("eager", 1)]
            least = min((row["text_tokens"] for row in rows), default=0)
            bars = {
                f"{row['method']} ({row['keep']})": row["ttft_ms"]["median"]
                for row in rows
                if row["text_tokens"] == least
            }
            groups[f"{result.data['preset']}\n{result.folder}"] = bars
    return groups


def draw_time(data: Data) -> Figure:
    """One axis for each group: they are of different machines and must not be compared."""
    figure = Figure(figsize=(4.2 * len(data), 4.0), dpi=110, layout="constrained")
    for axes, (title, bars) in zip(
        figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True
    ):
        names = list(bars)[::-1]
        drawn = axes.barh(names, [bars[name] for name in names], color="#0072b2")
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.set(title=title, xlabel="time per image, ms", xlim=(0, 1.18 * max(bars.values())))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def budget_data(results: Results) -> Data:
    """Device -> ``[tokens kept, speed-up of the first token]``."""
    lines: dict[str, list[list[float]]] = {}
    for result in results.named("scaling"):
        times = {
            sweep["what"]: {one["x"]: one["ms"]["median"] for one in sweep["points"]}
            for sweep in result.data["sweeps"]
            if sweep["axis"] == "kept tokens" and sweep["what"].startswith("time to first token")
        }
        if len(times) == 2:
            before, after = (times[f"time to first token, {name}"] for name in ("unpruned", "ocvtp"))
            models = f"{result.folder}, {result.data['models']} model"
            lines[models] = [[x, before[x] / after[x]] for x in sorted(before)]
    return lines or None


def draw_budget(data: Data) -> Figure:
    """One line for each device."""
    lines = {name: [(x, y) for x, y in line] for name, line in data.items()}
    ticks = [x for x, _ in next(iter(lines.values()))]
    figure = chart([Panel("time to the first token", lines)], "image tokens kept of 576", "speed-up", ticks)
    figure.set_size_inches(7.2, 4.6)
    figure.axes[0].axhline(1.0, color="#888888", linewidth=1)
    figure.axes[0].set_ylim(bottom=0)
    return figure


def kernels_data(results: Results) -> Data:
    """Kernel and case -> multiple of its floor, for every device that has one."""
    bars = {
        f"{row['op']} {row['case']} B={row['shape'].get('B', 1)} {row['mode']}, {result.folder}": row[
            "median_us"
        ]
        / row["floor_us"]
        for name in FAMILIES.values()
        for result in results.named(name)
        for row in with_floors(result)
        if row["mode"] == "graph"
    }
    return bars or None


def draw_kernels(data: Data) -> Figure:
    """Bars; 1 is the floor."""
    figure = Figure(figsize=(8, 1 + 0.22 * len(data)), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = list(data)[::-1]
    axes.barh(names, [data[name] for name in names], color="#0072b2")
    axes.axvline(1.0, color="#d55e00")
    axes.set(xlabel="measured time over the floor", xlim=(0, None))
    axes.tick_params(labelsize=7)
    return figure


#: File in ``docs`` -> what it is drawn from, and how.
PICTURES: dict[str, Drawing] = {
    "performance-flops.png": (flops_data, draw_flops),
    "performance-time.png": (time_data, draw_time),
    "methods-flops.png": (methods_data, draw_methods),
    "performance-budget.png": (budget_data, draw_budget),
    "performance-kernels.png": (kernels_data, draw_kernels),
}


def fingerprint(data: Data) -> str:
    """Of what a picture is drawn from."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(name: str, results: Results, folder: Path) -> None:
    """Draw one picture; without data there is none."""
    of, how = PICTURES[name]
    data, path = of(results), folder / name
    if data is None:
        path.unlink(missing_ok=True)
        return
    how(data).savefig(path, metadata={_KEY: fingerprint(data), "Software": None})


def is_current(name: str, results: Results, folder: Path) -> bool:
    """Whether a picture was drawn from these results."""
    data, path = PICTURES[name][0](results), folder / name
    if data is None or not path.exists():
        return data is None and not path.exists()
    with Image.open(path) as picture:
        return picture.info.get(_KEY) == fingerprint(data)
