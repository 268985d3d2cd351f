"""DivPrune, from what enters the language model."""

from __future__ import annotations

from bench.rivals.golden import Case
from ocvtp import methods


def check(case: Case) -> None:
    """``divprune_odd`` and ``divprune_tower``, whose sub-cases are beginnings of one order."""
    projected, keep = case["projected"], case.params["T"]
    case.equal("T", round(case.params["ratio"] * projected.shape[1]), keep)
    key = "fixed_order" if case.fixed else "order"
    order = methods.divprune_order(projected, keep)
    if case.golden.name == "divprune_tower":
        case.equal(f"{case.name}: beginning of order", order.tolist(), case["order"][:, :keep].tolist())
        case.needless("pixel_values")
    else:
        case.same(key, order)
        if case.fixed:
            case.needless("order")
    kept = methods.divprune(projected, keep).indices
    case.equal("kept", kept.tolist(), case[key][:, :keep].sort(dim=1).values.tolist())
