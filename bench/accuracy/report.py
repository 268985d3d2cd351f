"""Tables and a picture of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.accuracy.measure import BUDGETS, UNPRUNED
from bench.accuracy.relation import MEASURES
from bench.accuracy.selectors import ours_name
from bench.chart import Panel, chart
from bench.markdown import table

_ELEVEN = 11
_MEASURES = {
    "coverage_read": "coverage error, features read",
    "coverage_consumed": "coverage error, features consumed",
    "shown": "things asked about with a kept token on them",
}
#: Lines of the picture, of the first training; more could not be told apart.
_DRAWN = (
    "random",
    "uniform grid",
    "attention top-k",
    "farthest point",
    "k-medoids",
    "greedy DPP",
    ours_name(0),
    ours_name(1),
)

Rows = Sequence[dict[str, Any]]


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown: ``accuracy``, ``unseen``, ``kinds``, ``sizes``, ``measures``, ``relations``."""
    test = [row for row in record["rows"] if row["split"] == "test"]
    unseen = [row for row in record["rows"] if row["split"] == "unseen"]
    return {
        "accuracy": _accuracy(test),
        "unseen": _accuracy(unseen),
        "kinds": _columns(test, "kinds"),
        "sizes": _columns(test, "sizes"),
        "measures": _measures(test),
        "relations": _relations(record["relations"]),
    }


def picture(record: dict[str, Any]) -> Figure:
    """Accuracy against the budget, on both splits."""
    panels = []
    for split, title in (("test", "test"), ("unseen", "combinations never seen in training")):
        rows = [row for row in record["rows"] if row["split"] == split]
        if not rows:
            continue
        lines = {
            _label(row): [(p, 100 * _find(rows, _key(row), p)["accuracy"][0]) for p in BUDGETS]
            for row in _at(rows, BUDGETS[0])
            if row["method"] in _DRAWN and row["group"] in ("", _groups(rows)[0])
        }
        everything = 100 * next(row for row in rows if row["method"] == UNPRUNED)["accuracy"][0]
        lines[UNPRUNED] = [(p, everything) for p in BUDGETS]
        panels.append(Panel(title, lines))
    return chart(panels, "tokens kept, %", "right answers, %", BUDGETS)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["group"]


def _label(row: dict[str, Any]) -> str:
    return f"{row['method']} ({row['group']})" if row["group"] else row["method"]


def _groups(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in rows if row["group"])) or [""]


def _at(rows: Rows, percent: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["percent"] == percent]


def _find(rows: Rows, key: tuple[str, str], percent: int) -> dict[str, Any]:
    return next(row for row in _at(rows, percent) if _key(row) == key)


def with_interval(estimate: Sequence[float]) -> str:
    """Mean and half of the 95 % interval; empty if there was no question."""
    mean, low, high = estimate
    return "" if mean is None else f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def _accuracy(rows: Rows) -> str:
    if not rows:
        return "Not measured."
    keeps = [next(row["keep"] for row in _at(rows, percent)) for percent in BUDGETS]
    head = [" ", *(f"{p} % ({k})" for p, k in zip(BUDGETS, keeps, strict=True))]
    head += [f"beyond {whom} at {_ELEVEN} %" for whom in ("random", "ours as published")]
    lines = []
    for row in _at(rows, 100):
        lines.append([row["method"], *[with_interval(row["accuracy"])] * len(BUDGETS), "", ""])
    for row in _at(rows, BUDGETS[0]):
        at_eleven = _find(rows, _key(row), _ELEVEN)
        over = [at_eleven[name] for name in ("over_random", "over_published")]
        cells = [with_interval(_find(rows, _key(row), percent)["accuracy"]) for percent in BUDGETS]
        lines.append([_label(row), *cells, *(_signed(one) if one else "" for one in over)])
    return table(head, lines)


def _signed(estimate: Sequence[float]) -> str:
    mean, low, high = estimate
    return f"{100 * mean:+.1f} ± {50 * (high - low):.1f}"


def _columns(rows: Rows, what: str) -> str:
    """By kind or size: all tokens, the baselines, and every selector at 11 %."""
    names = list(rows[0][what])
    lines = [
        [_label(row), *(with_interval(row[what][name]) for name in names)]
        for row in [*_at(rows, 100), *_at(rows, _ELEVEN)]
    ]
    return table([f"at {_ELEVEN} %", *names], lines)


def _measures(rows: Rows) -> str:
    head = [" ", *(f"{name}, {p} %" for name in ("read", "consumed", "shown") for p in BUDGETS)]
    lines = []
    for row in _at(rows, BUDGETS[0]):
        cells = [_label(row)]
        for measure in MEASURES:
            for percent in BUDGETS:
                value = _find(rows, _key(row), percent)[measure]
                cells.append(f"{100 * value:.0f} %" if measure == "shown" else f"{value:.3f}")
        lines.append(cells)
    return table(head, lines)


def _relations(relations: Rows) -> str:
    head = [
        "accuracy goes with",
        *(f"{p} %, {how}" for p in BUDGETS for how in ("between", "rivals", "within")),
    ]
    lines = []
    for measure in MEASURES:
        cells = [_MEASURES[measure]]
        for percent in BUDGETS:
            one = next(r for r in relations if (r["measure"], r["percent"]) == (measure, percent))
            cells += ["" if one[how] is None else f"{one[how]:+.2f}" for how in ("between", "rivals")]
            mean, low, high = one["within"]
            cells.append("" if mean is None else f"{mean:+.2f} ± {(high - low) / 2:.2f}")
        lines.append(cells)
    return table(head, lines)
