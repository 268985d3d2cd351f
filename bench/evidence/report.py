"""Tables of the rows, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.evidence.rows import ALWAYS, BUDGETS, Row
from bench.evidence.selectors import PUBLISHED, RIVALS, VARIANTS
from bench.markdown import table

Line = tuple[str, str | None, str]
"""What a line is called, and whose row it is: pruner and method."""


def tables(rows: Sequence[Row], remedied: str) -> dict[str, str]:
    """Name -> Markdown.

    ``coverage`` and ``residual`` of rivals and of the pruner ``remedied``; ``training``: all pruners;
    ``remedies``: what helps ``remedied``; ``slots``: how many are alive.
    """
    pruners = list(dict.fromkeys(row.pruner for row in rows if row.pruner is not None))
    compared: list[Line] = [(name, None, name) for name in RIVALS]
    compared += [(f"**pruner, {name}**", remedied, name) for name in ALWAYS]
    trained: list[Line] = [
        (pruner if name == PUBLISHED else f"{pruner}, {name}", pruner, name)
        for name in ALWAYS
        for pruner in pruners
    ]
    return {
        "coverage": _errors(rows, compared, "coverage"),
        "residual": _errors(rows, compared, "residual"),
        "training": _errors(rows, trained, "coverage"),
        "remedies": _errors(rows, [(name, remedied, name) for name in VARIANTS], "coverage"),
        "slots": _slots(rows, pruners),
    }


def _errors(rows: Sequence[Row], wanted: Sequence[Line], measure: str) -> str:
    """Features read and consumed at every budget; coverage of several draws with its spread."""
    head = [" "]
    for what in ("read", "consumed"):
        head += [f"{what}, {percent} %" for percent in BUDGETS]
    lines = []
    for label, pruner, method in wanted:
        cells = [label]
        for what in ("read", "consumed"):
            for percent in BUDGETS:
                row = find(rows, pruner, method, percent)
                spread = ""
                if measure == "coverage" and row.seeds > 1:
                    spread = f" ± {getattr(row, f'spread_{what}'):.3f}"
                cells.append(f"{getattr(row, f'{measure}_{what}'):.3f}{spread}")
        lines.append(cells)
    return table(head, lines)


def _slots(rows: Sequence[Row], pruners: Sequence[str]) -> str:
    head = ["pruner"]
    for percent in BUDGETS:
        keep = next(row.keep for row in rows if row.percent == percent)
        head += [f"live of {keep}", "distinct picks"]
    lines = []
    for pruner in pruners:
        cells = [pruner]
        for percent in BUDGETS:
            row = find(rows, pruner, PUBLISHED, percent)
            cells += [f"{row.live:.1f}", f"{row.distinct:.1f}"]
        lines.append(cells)
    return table(head, lines)


def find(rows: Iterable[Row], pruner: str | None, method: str, percent: int) -> Row:
    """The row of that name and budget."""
    return next(r for r in rows if (r.pruner, r.method, r.percent) == (pruner, method, percent))
