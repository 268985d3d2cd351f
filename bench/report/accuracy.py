"""README's table of right answers."""

from __future__ import annotations

from bench.accuracy.measure import BLIND, UNPRUNED
from bench.accuracy.report import with_interval
from bench.accuracy.selectors import ours_name
from bench.markdown import table
from bench.report.results import Results

#: In the record -> in the table.
_LINES = {
    "farthest point": "farthest points, no pruner",
    "greedy DPP": "greedy DPP, no pruner (`ocvtp.methods`)",
    "ours": "pruner as published",
    "attention top-k": "attention received",
    "uniform grid": "uniform grid",
    "random": "random",
}
_BUDGETS = (5, 11, 33)


def answers(results: Results) -> str:
    """Right answers at three budgets, with those of all tokens and of none."""
    record = results.one("accuracy")
    if record is None:
        return "Not measured."
    rows = [row for row in record.data["rows"] if row["split"] == "test"]

    def cell(method: str, budget: int) -> str:
        found = [row for row in rows if (row["method"], row["percent"]) == (method, budget)]
        if len(found) == 1:
            return with_interval(found[0]["accuracy"])
        return " and ".join(f"{100 * row['accuracy'][0]:.1f}" for row in found)

    trainings = len({row["group"] for row in rows if row["method"] == ours_name(0)})
    lines = []
    for method, name in _LINES.items():
        which = ours_name(0) if method == "ours" else method
        label = f"{name}, {trainings} trainings" if method == "ours" else name
        lines.append([label, *(cell(which, budget) for budget in _BUDGETS)])
    head = ["right answers, %", *(f"{p} % of the tokens" if p == 5 else f"{p} %" for p in _BUDGETS)]
    said = (
        f"All tokens: {cell(UNPRUNED, 100)}; words alone: {cell(BLIND, 100)}. "
        f"{str(record)[0].upper()}{str(record)[1:]}, by `python -m bench.accuracy`."
    )
    return f"{table(head, lines)}\n\n{said}"
