"""Tables and a picture of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.accuracy.measure import BUDGETS, UNPRUNED
from bench.accuracy.relation import MEASURES, RELATED
from bench.accuracy.selectors import in_consumed, ours_name
from bench.accuracy.standing import BEFORE, BOTH, PLAIN, Mode
from bench.chart import Panel, chart
from bench.markdown import table

_FEW, _ELEVEN = 5, 11
_MEASURES = {
    "coverage_read": "coverage error, features read",
    "coverage_consumed": "coverage error, features consumed",
    "shown": "things asked about with a kept token on them",
}
_MODES = {
    PLAIN: "kept tokens as they are",
    "merged": "merged",
    "weighted": "weighted",
    BOTH: "both",
    BEFORE: "both, mean before the projector",
}
#: Lines of the picture, of the first training; more could not be told apart.
_DRAWN = (
    "random",
    "uniform grid",
    "attention top-k",
    "greedy DPP",
    in_consumed("farthest point"),
    in_consumed("greedy DPP"),
    ours_name(0),
    in_consumed("ours"),
)
#: Lines of the tables by kind and size, whose other rows would say little more.
_SHOWN = ("random", "attention top-k", "farthest point", *_DRAWN[3:])

Row = dict[str, Any]
Rows = Sequence[Row]


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Name of a block of the document -> Markdown."""
    test = [row for row in record["rows"] if row["split"] == "test"]
    unseen = [row for row in record["rows"] if row["split"] == "unseen"]
    return {
        "accuracy": _accuracy(test),
        "unseen": _accuracy(unseen),
        "modes": _by_mode(test),
        "kinds": _columns(test, "kinds"),
        "sizes": _columns(test, "sizes"),
        "measures": _measures(test),
        "relations": _relations(record["relations"]),
    }


def picture(record: dict[str, Any]) -> Figure:
    """Accuracy against the budget: kept tokens as they are, and standing for all others, on both splits."""
    panels = []
    for split, mode, title in (
        ("test", PLAIN, "kept tokens as they are"),
        ("test", BOTH, "merged and weighted"),
        ("unseen", BOTH, "merged and weighted, combinations never seen"),
    ):
        rows = [row for row in record["rows"] if row["split"] == split]
        if not rows:
            continue
        lines = {
            _label(row): [(p, 100 * _find(rows, row, p, mode)["accuracy"][0]) for p in BUDGETS]
            for row in _selectors(rows)
            if row["method"] in _DRAWN and row["group"] in _first_groups(rows)
        }
        everything = 100 * next(row for row in rows if row["method"] == UNPRUNED)["accuracy"][0]
        lines[UNPRUNED] = [(p, everything) for p in BUDGETS]
        panels.append(Panel(title, lines))
    return chart(panels, "tokens kept, %", "right answers, %", BUDGETS)


def _label(row: Row) -> str:
    return f"{row['method']} ({row['group']})" if row["group"] else row["method"]


def _first_groups(rows: Rows) -> set[str]:
    """The first training of each method, and ``""``."""
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["method"], row["group"])
    return set(first.values())


def _baselines(rows: Rows) -> list[Row]:
    return [row for row in rows if row["percent"] == 100]


def _selectors(rows: Rows) -> list[Row]:
    """One row for every selector."""
    return [row for row in rows if (row["percent"], row["mode"]) == (BUDGETS[0], PLAIN)]


def _find(rows: Rows, like: Row, percent: int, mode: Mode) -> Row:
    """Of the same selector."""
    found = _look(rows, like, percent, mode)
    assert found is not None
    return found


def _look(rows: Rows, like: Row, percent: int, mode: Mode) -> Row | None:
    wanted = (like["method"], like["group"], percent, mode)
    return next(
        (row for row in rows if (row["method"], row["group"], row["percent"], row["mode"]) == wanted), None
    )


def with_interval(estimate: Sequence[float]) -> str:
    """Mean and half of the 95 % interval; empty if there was no question."""
    mean, low, high = estimate
    return "" if mean is None else f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def _accuracy(rows: Rows) -> str:
    """Every selector at every budget: plain, then both."""
    if not rows:
        return "Not measured."
    keeps = [next(row["keep"] for row in rows if row["percent"] == percent) for percent in BUDGETS]
    head = ["plain → both", *(f"{p} % ({k})" for p, k in zip(BUDGETS, keeps, strict=True))]
    head += [f"both beyond all tokens at {p} %" for p in (_FEW, _ELEVEN)]
    head += [f"beyond ours as published at {p} %, both" for p in (_FEW, _ELEVEN)]
    lines = [
        [row["method"], *[with_interval(row["accuracy"])] * len(BUDGETS), "", "", "", ""]
        for row in _baselines(rows)
    ]
    for row in _selectors(rows):
        each = [[_find(rows, row, percent, mode) for mode in (PLAIN, BOTH)] for percent in BUDGETS]
        few, eleven = (_find(rows, row, percent, BOTH) for percent in (_FEW, _ELEVEN))
        lines.append(
            [
                _label(row),
                *(
                    f"{100 * plain['accuracy'][0]:.1f} → {with_interval(both['accuracy'])}"
                    for plain, both in each
                ),
                *(_signed(one["over_everything"]) for one in (few, eleven)),
                *(_signed(one["over_published"]) for one in (few, eleven)),
            ]
        )
    return table(head, lines)


def _by_mode(rows: Rows) -> str:
    """Every selector in every mode, with few tokens."""
    if not rows:
        return "Not measured."
    head = [" ", *(f"{name}, {percent} %" for percent in (_FEW, _ELEVEN) for name in _MODES.values())]
    lines = []
    for row in _selectors(rows):
        found = [_look(rows, row, percent, mode) for percent in (_FEW, _ELEVEN) for mode in _MODES]
        lines.append(
            [_label(row), *("" if one is None else f"{100 * one['accuracy'][0]:.1f}" for one in found)]
        )
    return table(head, lines)


def _signed(estimate: Sequence[float] | None) -> str:
    if not estimate:
        return ""
    mean, low, high = estimate
    return f"{100 * mean:+.1f} ± {50 * (high - low):.1f}"


def _columns(rows: Rows, what: str) -> str:
    """By kind or size: all tokens, the baselines, and some selectors at 11 %, plain and both."""
    names = list(rows[0][what])
    lines = [[row["method"], *(with_interval(row[what][name]) for name in names)] for row in _baselines(rows)]
    for like in _selectors(rows):
        for mode in (PLAIN, BOTH) if like["method"] in _SHOWN else ():
            row = _find(rows, like, _ELEVEN, mode)
            lines.append([f"{_label(row)}, {mode}", *(with_interval(row[what][name]) for name in names)])
    return table([f"at {_ELEVEN} %", *names], lines)


def _measures(rows: Rows) -> str:
    head = [" ", *(f"{name}, {p} %" for name in ("read", "consumed", "shown") for p in BUDGETS)]
    lines = []
    for row in _selectors(rows):
        cells = [_label(row)]
        for measure in MEASURES:
            for percent in BUDGETS:
                value = _find(rows, row, percent, PLAIN)[measure]
                cells.append(f"{100 * value:.0f} %" if measure == "shown" else f"{value:.3f}")
        lines.append(cells)
    return table(head, lines)


def _relations(relations: Rows) -> str:
    head = [
        "accuracy goes with",
        *(f"{p} %, {how}" for p in BUDGETS for how in ("between", "rivals", "within")),
    ]
    lines = []
    for mode in RELATED:
        for measure in MEASURES:
            cells = [f"{mode}: {_MEASURES[measure]}"]
            for percent in BUDGETS:
                wanted = (mode, measure, percent)
                one = next(r for r in relations if (r["mode"], r["measure"], r["percent"]) == wanted)
                cells += ["" if one[how] is None else f"{one[how]:+.2f}" for how in ("between", "rivals")]
                mean, low, high = one["within"]
                cells.append("" if mean is None else f"{mean:+.2f} ± {(high - low) / 2:.2f}")
            lines.append(cells)
    return table(head, lines)
