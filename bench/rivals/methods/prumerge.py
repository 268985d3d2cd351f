"""PruMerge and PruMerge+, from queries, keys and features."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from ocvtp import methods


def check(case: Case) -> None:
    """``prumerge_odd`` and ``prumerge_tower``."""
    odd = case.golden.name == "prumerge_odd"
    q, k = (case["q"], case["k"]) if odd else (case["q_23"], case["k_23"])
    row = methods.one_head_row(q[:, 0], k)
    if not odd:
        case.close("cls_scores", row)
        case.needless("pixel_values")
    images = case.params.get("images", list(range(len(row))))
    of = (case["features"][images, 1:], row[images], k[images, 1:])
    if case.name == "plus_fixed":
        for image in images:
            one = (part[image : image + 1] for part in of)
            found = methods.prumerge_published(*one, plus=True, ratio=case.params["ratio"])
            case.same(f"fixed_kept_{image}", found.slots[0, :-1])
            case.close(f"fixed_rows_{image}", found.rows[0])
        case.needless("kept", "rows")
        return
    adaptive = case.name.startswith(("adaptive", "plus", "flat"))
    plus = case.name.startswith("plus")
    found = methods.prumerge_published(*of, plus=plus, ratio=None if adaptive else case.params["ratio"])
    if case.name == "flat":
        case.close("rows", found.rows)
        try:
            methods.prumerge_published(*of, plus=True)
        except ValueError:
            return
        case.equal("PruMerge+ without outliers", "no error", "ValueError")
        return
    prefix = "fixed_" if case.fixed else ""
    case.same(f"{prefix}kept", found.slots[:, :-1])
    case.close(f"{prefix}rows", found.rows)
    if case.fixed:
        case.needless("kept", "rows")
    if not plus:
        fixed = methods.prumerge(*of, keep=found.rows.shape[1])
        case.equal("the same by a budget", torch.equal(fixed.rows, found.rows), True)
