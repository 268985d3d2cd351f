"""VisionZip, from class rows, keys and hidden states; its Qwen2.5-VL form from stored queries and keys."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from bench.rivals.methods.attention import HEADS, class_row, heads, merged_sums
from ocvtp import methods
from ocvtp.selection import Reduction


def check(case: Case) -> None:
    """``visionzip_odd``, ``visionzip_tower`` and ``visionzip_qwen``."""
    if case.golden.name == "visionzip_qwen":
        _qwen(case)
    elif case.name == "next":
        dominant = case["topk"][:, 1:].sort(dim=1).values - 1
        tiles = case.params["tiles_width_height"][::-1]
        case.same(
            "order", methods.visionzip_tiles(dominant, case.params["contextual"], tiles=tuple(tiles), side=24)
        )
    elif case.golden.name == "visionzip_tower":
        tower = case.beside("tower_clip")
        case.close("cls_scores", HEADS * class_row(case, 22))
        case.close("key", heads(tower["k_22"]).mean(dim=1))
        _clip(case, tower["features"], case["cls_scores"])
    else:
        _clip(case, case["hidden"], case["cls_rows"].sum(dim=1))


def _clip(case: Case, hidden: torch.Tensor, scores: torch.Tensor) -> None:
    dominant, contextual = case.params["dominant"], case.params["contextual"]
    found = methods.visionzip(hidden, scores, case["key"], dominant, contextual)
    class_token = torch.zeros(len(hidden), 1, dtype=torch.int64)
    first = torch.cat([class_token, found.slots[:, 1:dominant] + 1], dim=1)
    if case.fixed:
        case.same("fixed_dominant", first)
        case.close("fixed_rows", found.rows)
        case.needless("topk", "rows")
        return
    case.same_set("topk", first)
    case.close("rows", found.rows)
    case.same("targets", found.slots[:, dominant:] + 1)
    merged = _merged(found, dominant)
    case.same("merged", merged + 1)
    case.same("into", found.owner.gather(1, merged) - dominant)


def _merged(found: Reduction, dominant: int) -> torch.Tensor:
    """``[B, n]`` ascending: tokens in a contextual row that don't give it its place."""
    apart = found.owner >= dominant
    apart = apart.scatter(1, found.slots[:, dominant:], False)
    return apart.nonzero()[:, 1].reshape(len(apart), -1)


def _qwen(case: Case) -> None:
    window = case["window_index"]
    case.close("scores", merged_sums(case["q_7"], case["k_7"], window))
    key = case["k_7"].unflatten(0, (-1, 4)).mean(dim=1).mean(dim=1)[window.argsort()]
    case.close("key", key)
    dominant, contextual = case.params["dominant"], case.params["contextual"]
    found = methods.visionzip_merged(
        case["merged"][None], case["scores"][None], case["key"][None], dominant, contextual
    )
    case.same("kept", found.slots[0])
    case.close("rows", found.rows[0])
    total = case["merged"].shape[0]
    case.equal("dominant", int(case.params["dominant_share"] * total), dominant)
    case.equal("contextual", max(int(case.params["contextual_share"] * total), 1), contextual)
    case.same("dominant", methods.attention_top_k(case["scores"][None], dominant).indices[0])
    targets = found.slots[0][~torch.isin(found.slots[0], case["dominant"])]
    case.same("targets", targets)
    case.needless("pixel_values")
    case.needs_tower("position_ids", "last_logits")
