"""README's table of right answers."""

from __future__ import annotations

from bench.accuracy.measure import BLIND, GUESSED, UNPRUNED
from bench.accuracy.report import with_interval
from bench.accuracy.selectors import in_consumed, ours_name
from bench.accuracy.standing import BOTH, PLAIN, Mode
from bench.markdown import table
from bench.report.results import Results

#: In the record -> in the table.
_LINES = {
    in_consumed("greedy DPP"): "greedy DPP, no pruner",
    in_consumed("farthest point"): "farthest points, no pruner",
    in_consumed("ours"): "pruner trained on the consumed layer",
    ours_name(0): "pruner as published, early layer",
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

    def cell(method: str, budget: int, mode: Mode = PLAIN) -> str:
        wanted = (method, budget, mode)
        found = [row for row in rows if (row["method"], row["percent"], row["mode"]) == wanted]
        if len(found) == 1:
            return with_interval(found[0]["accuracy"])
        return " and ".join(f"{100 * row['accuracy'][0]:.1f}" for row in found)

    lines = []
    for method, name in _LINES.items():
        trainings = len({row["group"] for row in rows if row["method"] == method})
        label = f"{name}, {trainings} trainings" if trainings > 1 else name
        lines.append([label, *(cell(method, budget, mode) for budget in _BUDGETS for mode in (PLAIN, BOTH))])
    head = ["right answers, %"]
    for budget in _BUDGETS:
        head += [f"{budget} % of the tokens", f"{budget} %, merged and weighted"]
    said = (
        f"All tokens: {cell(UNPRUNED, 100)}; words alone: {cell(BLIND, 100) or cell(GUESSED, 100)}. "
        f"{str(record)[0].upper()}{str(record)[1:]}, by `python -m bench.accuracy`."
    )
    return f"{table(head, lines)}\n\n{said}"
