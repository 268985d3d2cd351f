"""PruMerge and PruMerge+: tokens by class attention with their neighbours added, and a row of the rest."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import (
    best,
    check_features,
    check_share,
    check_tensor,
    cosines,
    others,
    owners,
    rows_of,
    wide,
    wide_rows,
)
from ocvtp.methods._outliers import outliers
from ocvtp.selection import Reduction
from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._checks import as_int, require_floating, require_shape
from ocvtp_kernels._device import without_autocast


@torch.no_grad()
def one_head_row(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How much the class token attends to each patch, all columns taken as one head.

    ``softmax(query . keys * C ** -0.5)``, without the class token's own column, which takes part in the
    softmax. PruMerge reads queries and keys of the block after the features it merges.

    Args:
        query: ``[B, C]`` finite floating point, the class token's query before it is cut into heads.
        keys: ``[B, 1 + N, C]`` finite floating point, all tokens' keys, the class token's first.

    Returns:
        ``[B, N]`` in at least float32.

    Raises:
        TypeError, ValueError: a wrong type or shape, or NaN or Inf.
    """
    require_floating("keys", keys)
    require_shape("keys", keys, (None, None, None), "[B, 1 + N, C]")
    check_tensor("keys", keys, (None, None, None), "[B, 1 + N, C]", keys)
    check_tensor("query", query, (keys.shape[0], keys.shape[2]), "[B, C] of keys", keys)
    scale = keys.shape[2] ** -0.5
    (row,) = image_by_image(
        lambda q, k: (((q[:, None] * k).sum(dim=2) * scale).softmax(dim=1),), wide(query), wide(keys)
    )
    return row[:, 1:]


def prumerge(
    features: torch.Tensor,
    class_row: torch.Tensor,
    keys: torch.Tensor,
    keep: int,
    *,
    spread: float = 0.0,
    neighbours: int = 32,
) -> Reduction:
    """``keep`` rows: tokens by attention, perhaps some evenly spread ones, and one of all the rest.

    PruMerge and PruMerge+, arXiv 2403.15388, with a fixed budget, which is ours: the published methods let
    outliers set it (:func:`prumerge_published`). PruMerge+ is ``spread=0.75``. Each row is a kept token's
    features plus those of its nearest neighbours by key, kept ones among them, each times its attention. The
    last row is the sum of all tokens not kept, each times its attention.

    Args:
        features: ``[B, N, C]`` finite floating point: the tower's patches, of which rows are made.
        class_row: ``[B, N]`` finite floating point (:func:`one_head_row`).
        keys: ``[B, N, d]`` finite floating point, the patches' keys.
        keep: rows to make, that of the rest among them, ``1 <= keep <= N``.
        spread: share of the kept tokens, from 0 to 1, that are evenly spread over those that attention did
            not choose, in raster order.
        neighbours: added to each row, at least 0; all other tokens where there are fewer.

    Returns:
        :class:`~ocvtp.selection.Reduction` with rows ``[B, keep, C]`` in the features' dtype: by attention,
        best first, then the spread ones ascending, then the rest's, which takes the place of the last of
        those. ``owner`` is -1 of tokens that are not kept, since they go into several rows. Rows are
        differentiable in ``features``; to them attention and keys are constants, as the choice is.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget or share, or NaN or Inf.
    """
    keep = check_features(features, keep)
    spread, neighbours = check_share("spread", spread), _check(features, class_row, keys, neighbours)
    tokens = features.shape[1]
    even = int((keep - 1) * spread)
    kept = best(class_row, keep - 1 - even)
    left = others(kept, tokens)
    at = (2 * torch.arange(even, device=left.device) + 1) * left.shape[1] // (2 * max(even, 1))
    kept = torch.cat([kept, left[:, at]], dim=1)
    return _merged(features, class_row, keys, kept, neighbours)


def prumerge_published(
    features: torch.Tensor,
    class_row: torch.Tensor,
    keys: torch.Tensor,
    *,
    plus: bool = False,
    ratio: float | None = None,
    neighbours: int = 32,
) -> Reduction:
    """The published budgets: as many tokens as stand out, or a ratio; PruMerge+ adds every so many-th one.

    Without ``ratio``, it is the share of outliers: of all scores of the batch, those above the third quartile
    by more than 1.5 interquartile ranges. ``int(N * ratio)`` tokens are kept by attention. PruMerge+ adds, if
    they are not among them, tokens 0, s, 2s, ... below N - 1 with ``s = int(1 / ratio) // 3``; with a given
    ratio, ``s = int(1 / ratio)`` and the first is ``s // 2``. The published code repeats tokens there. Waits
    for a GPU, since sizes depend on scores.

    Args:
        features: ``[B, N, C]``, as for :func:`prumerge`. One count serves the batch, so give one image for a
            count of its own; PruMerge+ takes no more than one.
        class_row: ``[B, N]``, the same.
        keys: ``[B, N, d]``, the same.
        plus: PruMerge+.
        ratio: share of tokens kept by attention, above 0 and below 1; ``None`` counts outliers.
        neighbours: added to each row.

    Returns:
        :class:`~ocvtp.selection.Reduction` as of :func:`prumerge`, likewise differentiable in ``features``,
        with as many rows as it takes: where no token stands out, one row of all tokens.

    Raises:
        TypeError, ValueError: a wrong type, shape or ratio, NaN or Inf, several images for PruMerge+, or no
            outlier for it.
    """
    check_features(features, 1)
    neighbours = _check(features, class_row, keys, neighbours)
    batch, tokens, _ = features.shape
    if plus and batch != 1:
        raise ValueError(f"PruMerge+ keeps as many as each image has it; give one at a time, not {batch}")
    if ratio is not None:
        number = check_share("ratio", ratio, below_one=True)
        by_attention, step = int(tokens * number), int(1 / number) if number else 0
        start = step // 2
    else:
        count = outliers(class_row)
        by_attention, step, start = count // batch, batch * tokens // count // 3 if count else 0, 0
    if plus and step == 0:
        raise ValueError(
            "no token stands out, so PruMerge+ has no step between its spread tokens"
            if ratio is None
            else f"ratio must be above 0 and at most 1; got {ratio!r}"
        )
    kept = best(class_row, by_attention)
    if plus:
        grid = torch.arange(start, tokens - 1, step, device=kept.device)
        kept = torch.cat([kept, grid[~torch.isin(grid, kept[0])][None]], dim=1)
    return _merged(features, class_row, keys, kept, neighbours)


def _check(features: torch.Tensor, class_row: torch.Tensor, keys: torch.Tensor, neighbours: object) -> int:
    batch, tokens, _ = features.shape
    check_tensor("features", features, (None, None, None), "[B, N, C]", features)
    check_tensor("class_row", class_row, (batch, tokens), "[B, N] of features", features)
    check_tensor("keys", keys, (batch, tokens, None), "[B, N, d] of features", features)
    count = as_int(neighbours)
    if count is None or count < 0:
        raise ValueError(f"neighbours must be an int of at least 0; got {neighbours!r}")
    return min(count, tokens - 1)


def _merged(
    features: torch.Tensor, class_row: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor, neighbours: int
) -> Reduction:
    """Rows of ``kept`` ``[B, k]`` in their order, and the last one."""
    tokens = features.shape[1]
    similar = cosines(rows_of(keys.detach(), kept), keys)
    similar = similar.scatter(2, kept[:, :, None], float("-inf"))  # nobody is a neighbour of itself
    near = similar.sort(dim=2, descending=True, stable=True).indices[:, :, :neighbours]
    dropped = others(kept, tokens)
    weights = wide(class_row)
    share = weights[:, None].expand(-1, kept.shape[1], -1)
    added = torch.zeros_like(share).scatter(2, near, share.gather(2, near))
    rest = torch.zeros_like(weights).scatter(1, dropped, weights.gather(1, dropped))
    x = wide_rows(features)  # once, so that gradients add up before they are rounded to the features' dtype
    with without_autocast(features.device):
        (sums,) = image_by_image(lambda share, x: (share @ x,), torch.cat([added, rest[:, None]], dim=1), x)
    rows = torch.cat([rows_of(x, kept) + sums[:, :-1], sums[:, -1:]], dim=1)
    slots = torch.cat([kept, dropped[:, -1:]], dim=1)
    return Reduction(rows.to(features.dtype), slots, owners(kept, tokens), tokens)
