"""HiPrune: anchors of a middle layer with their neighbours, and registers of a deep one."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import best, check_share, check_tensor, chosen, wide
from ocvtp.selection import Selection
from ocvtp_kernels._checks import require_count, require_floating, require_shape


@torch.no_grad()
def hiprune(
    object_scores: torch.Tensor,
    deep_scores: torch.Tensor,
    keep: int,
    *,
    shape: tuple[int, int],
    alpha: float = 0.1,
) -> Selection:
    """Anchors by a middle layer, the four tokens around each, and for the rest the best of a deep layer.

    HiPrune, arXiv 2508.00553. ``round(keep * alpha / 5)`` anchors, halves to even: none at all below a
    budget of 26 with the default. Neighbours are those one index and one row before and behind, kept within
    0 and N - 1: at a row's end they lie in the next or the previous one. What is chosen already is masked,
    where the published code lowers its score by 1, which for summed scores is not enough and keeps too few.

    Args:
        object_scores: ``[B, N]`` finite floating point, what each token receives in the middle layer
            (:func:`ocvtp_kernels.received_attention.received_attention`); only its order matters.
        deep_scores: ``[B, N]`` finite floating point, the same of the deep layer.
        keep: tokens to keep, ``1 <= keep <= N``. For a picture of several tiles, each tile's.
        shape: rows and columns of the tokens, in raster order.
        alpha: share of the budget, from 0 to 1, that anchors and neighbours may take.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, NaN or Inf, or an ``alpha`` whose anchors and
            neighbours may exceed the budget.
    """
    require_floating("object_scores", object_scores)
    require_shape("object_scores", object_scores, (None, None), "[B, N]")
    batch, tokens = object_scores.shape
    keep = require_count("keep", keep, tokens, "the number of tokens N")
    check_tensor("object_scores", object_scores, (batch, tokens), "[B, N]", object_scores)
    check_tensor("deep_scores", deep_scores, (batch, tokens), "[B, N] of object_scores", object_scores)
    height, width = shape
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are not {height} x {width}; give shape=(rows, columns)")
    near = anchors_and_neighbours(object_scores, _anchors(keep, check_share("alpha", alpha)), width)
    deep = wide(deep_scores)
    # Above all scores, so that the one stable sort fills up however many of the neighbours coincide.
    deep = deep.scatter(1, near, float("inf"))
    return chosen(best(deep, keep), tokens)


def anchors_and_neighbours(object_scores: torch.Tensor, anchors: int, width: int) -> torch.Tensor:
    """``[B, 5 * anchors]`` int64: the best of ``object_scores`` ``[B, N]``, and those around each.

    Anchors come best first, behind each the tokens before, after, above and below it in rows of ``width``;
    some may coincide.
    """
    anchor = best(object_scores, anchors)
    near = torch.stack([anchor, anchor - 1, anchor + 1, anchor - width, anchor + width], dim=2)
    return near.flatten(1).clamp(0, object_scores.shape[1] - 1)


def _anchors(keep: int, alpha: float) -> int:
    anchors = round(keep * alpha / 5)
    if 5 * anchors > keep:
        limit = (keep // 5 + 0.5) * 5 / keep
        raise ValueError(
            f"alpha={alpha:g} makes {anchors} anchors, with neighbours {5 * anchors} tokens of a budget "
            f"of {keep}; alpha must be below {limit:.4g}"
        )
    return anchors
