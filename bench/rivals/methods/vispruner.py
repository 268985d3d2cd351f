"""VisPruner, from the class token's row and features."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from ocvtp import methods


def dtypes(file: str, case: str) -> tuple[torch.dtype, ...]:
    """Float64 alone where rounding decides: on a tower's features, and among copies."""
    if file == "vispruner_tower" or case == "ties":
        return (torch.float64,)
    return (torch.float32, torch.float64)


def check(case: Case) -> None:
    """``vispruner_odd`` and ``vispruner_tower``."""
    keep, share = case.params["T"], case.params["important_ratio"]
    row = case["cls_scores"] if "cls_scores" in case else case["cls_rows"].mean(dim=1)
    if case.name == "ties":  # multiples of 0.0005, equal as such and not as sums of float32
        row = (row * 1e7).round()
    order = methods.vispruner_order(case["features"], row, keep, important=share)
    kept = methods.vispruner(case["features"], row, keep, important=share).indices
    case.same("fixed_kept" if case.fixed else "kept", kept)
    attended = int(keep * share)
    if "important" in case:
        case.same("important", order[:, :attended])
    if "diverse" in case:
        case.same("diverse", order[:, attended:])
    case.needless("pixel_values")
    if case.fixed:
        case.needless("kept")
