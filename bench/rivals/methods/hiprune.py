"""HiPrune, from what each token receives in two blocks."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from bench.rivals.methods.attention import column_means, merged_sums
from ocvtp import methods
from ocvtp.methods.hiprune import anchors_and_neighbours


def check(case: Case) -> None:
    """``hiprune_odd``, ``hiprune_tower`` and ``hiprune_qwen``."""
    if case.golden.name == "hiprune_qwen":
        _qwen(case)
        return
    if case.golden.name == "hiprune_tower":
        case.close("object_scores", column_means(case, 8))
        case.close("deep_scores", column_means(case, 22))
    keep, alpha = case.params["budget"] // case.params.get("tiles", 1), case.params["alpha"]
    object_scores = case["object_scores"]
    found = methods.hiprune(object_scores, case["deep_scores"], keep, shape=(24, 24), alpha=alpha)
    case.same("fixed_kept" if case.fixed else "kept", found.indices)
    if case.fixed:
        case.needless("kept")
    if "anchors" in case:
        count = case["anchors"].shape[1]
        near = anchors_and_neighbours(object_scores, count, 24)
        case.same("anchors", near[:, ::5])
        case.same("near", _distinct(near))


def _distinct(tokens: torch.Tensor) -> torch.Tensor:
    """Rows ascending, without repetitions, filled up with -1."""
    rows = [sorted(set(row)) for row in tokens.tolist()]
    return torch.tensor([row + [-1] * (tokens.shape[1] - len(row)) for row in rows])


def _qwen(case: Case) -> None:
    window = case["window_index"]
    for block, key in ((3, "object_scores"), (7, "deep_scores")):
        if f"q_{block}" in case:
            case.close(key, merged_sums(case[f"q_{block}"], case[f"k_{block}"], window))
    found = methods.hiprune(
        case["object_scores"][None],
        case["deep_scores"][None],
        case.params["budget"],
        shape=tuple(case.params["merged_grid"]),
        alpha=case.params["alpha"],
    ).indices[0]
    case.same("fixed_kept", found)
    if case.fixed:
        case.needless("kept", "position_ids", "last_logits")
    else:
        case.same("kept", found)
        case.needs_tower("position_ids", "last_logits")
    case.needless("pixel_values", "merged")
