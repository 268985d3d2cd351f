"""VisionZip: dominant tokens by attention, and contextual ones that merge what is left by their keys."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import best, check_tensor, cosines, others, rows_of, wide_rows
from ocvtp.selection import Reduction
from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._checks import as_int, require_count, require_floating, require_int64, require_shape
from ocvtp_kernels._device import without_autocast


def visionzip(
    features: torch.Tensor, class_row: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> Reduction:
    """The class token and the patches it attends to most, then rows that each merge some of the others.

    VisionZip, arXiv 2412.04467. Of the tokens left over, in raster order, every ``n // contextual``-th is a
    target, the first ``contextual`` of them; all others join the target of the most similar key. A row is its
    target's features plus the mean of those that joined: a sum of two, so of about twice the norm.

    Args:
        features: ``[B, 1 + N, C]`` finite floating point, the class token first.
        class_row: ``[B, N]`` finite floating point, how much the class token attends to each patch; sum or
            mean over heads.
        keys: ``[B, 1 + N, d]`` finite floating point, mean over heads of the same block's keys.
        dominant: rows of the class token and of its patches, ``1 <= dominant <= N``.
        contextual: rows that merge, at least 1 and at most the ``1 + N - dominant`` tokens that are left.

    Returns:
        :class:`~ocvtp.selection.Reduction` of N tokens with rows ``[B, dominant + contextual, C]`` in the
        features' dtype: class token, dominant patches ascending, contextual rows. A contextual row takes its
        target's place, the class token that of the first patch that was merged away; -1 if none was, since
        then there are more rows than patches. Rows are differentiable in ``features``; who is kept and who
        joins whom has no gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    require_floating("features", features)
    require_shape("features", features, (None, None, None), "[B, 1 + N, C]")
    batch, tokens = features.shape[0], features.shape[1] - 1
    dominant = require_count("dominant", dominant, tokens, "the number of patches N")
    most = tokens + 1 - dominant
    contextual = require_count("contextual", contextual, most, "the tokens left over, 1 + N - dominant")
    _check(features, class_row, keys, (batch, tokens), tokens + 1)
    patches, keys = features[:, 1:], keys.detach()[:, 1:]
    kept = best(class_row, dominant - 1).sort(dim=1).values
    zipped = _zip(patches, keys, kept, contextual)
    slots = zipped.slots
    taken = torch.cat([features[:, :1], zipped.rows], dim=1)
    free = others(slots, tokens)
    first = free[:, :1] if free.shape[1] else slots.new_full((batch, 1), -1)
    return Reduction(taken, torch.cat([first, slots], dim=1), zipped.owner + 1, tokens)


def visionzip_merged(
    features: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> Reduction:
    """The same without a class token, as published for Qwen2.5-VL: rows stand at their tokens' places.

    Args:
        features: ``[B, N, D]`` finite floating point: the patch merger's rows, of which rows are made.
        scores: ``[B, N]`` finite floating point, what each merged token's patches receive in the last block.
        keys: ``[B, N, d]`` finite floating point, after rotary embedding, mean over patches and heads.
        dominant: tokens kept as they are, ``0 <= dominant < N``.
        contextual: rows that merge, at least 1 and at most the ``N - dominant`` tokens that are left.

    Returns:
        :class:`~ocvtp.selection.Reduction` with rows ``[B, dominant + contextual, D]`` in the features'
        dtype, ascending by place; a contextual row takes its target's. Rows are differentiable in
        ``features``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    require_floating("features", features)
    require_shape("features", features, (None, None, None), "[B, N, D]")
    batch, tokens, _ = features.shape
    if as_int(dominant) != 0:
        dominant = require_count("dominant", dominant, tokens - 1, "the number of tokens N but one")
    contextual = require_count(
        "contextual", contextual, tokens - dominant, "the tokens left over, N - dominant"
    )
    _check(features, scores, keys, (batch, tokens), tokens)
    kept = best(scores, dominant).sort(dim=1).values
    return _zip(features, keys.detach(), kept, contextual).by_place()


def visionzip_tiles(
    dominant: torch.Tensor, contextual: int, *, tiles: tuple[int, int], side: int
) -> torch.Tensor:
    """The order in which the rows of a tiled picture reach the language model.

    The base picture's rows first; then the dominant patches of all tiles, row by row of the whole picture;
    then the tiles' class tokens, and their contextual rows tile by tile.

    Args:
        dominant: ``[1 + rows * columns, D - 1]`` int64: dominant patches of the base picture and of the tiles
            in raster order, ascending, the class token not counted (``slots[:, 1:D]`` of :func:`visionzip`).
        contextual: contextual rows of each.
        tiles: rows and columns of tiles.
        side: patches along a tile's side.

    Returns:
        ``[(1 + rows * columns) * (D + contextual)]`` int64, indices of all tiles' rows one after another.

    Raises:
        TypeError, ValueError: a wrong type, shape or number.
    """
    rows, columns = tiles
    require_int64("dominant", dominant)
    require_shape("dominant", dominant, (1 + rows * columns, None), "[1 + tiles, D - 1]")
    contextual = require_count("contextual", contextual, side * side, "the patches of a tile")
    each = 1 + dominant.shape[1] + contextual
    starts = each * torch.arange(1, 1 + rows * columns, device=dominant.device)
    tile = torch.arange(rows * columns, device=dominant.device)[:, None]
    y = tile // columns * side + dominant[1:] // side
    x = tile % columns * side + dominant[1:] % side
    patches = starts[:, None] + 1 + torch.arange(dominant.shape[1], device=dominant.device)
    patches = patches.flatten()[(y * columns * side + x).flatten().argsort(stable=True)]
    merged = starts[:, None] + 1 + dominant.shape[1] + torch.arange(contextual, device=dominant.device)
    base = torch.arange(each, device=dominant.device)
    return torch.cat([base, patches, starts, merged.flatten()])


def _check(
    features: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor, shape: tuple[int, int], rows: int
) -> None:
    check_tensor("features", features, (None, None, None), "[B, tokens, C]", features)
    check_tensor("scores", scores, shape, "[B, N] of features", features)
    check_tensor("keys", keys, (shape[0], rows, None), "[B, tokens, d] of features", features)


def _zip(features: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor, contextual: int) -> Reduction:
    """Rows of ``kept`` ``[B, k]`` ascending, then contextual ones."""
    tokens, count = features.shape[1], kept.shape[1]
    left = others(kept, tokens)
    step = max(1, left.shape[1] // contextual)
    places = torch.arange(contextual, device=features.device) * step
    targets = left[:, places]
    slots = torch.cat([kept, targets], dim=1)
    joining = others(slots, tokens)
    into = cosines(rows_of(keys, joining), rows_of(keys, targets)).argmax(dim=2)
    with without_autocast(features.device):
        (merged,) = image_by_image(
            _target_and_mean,
            wide_rows(rows_of(features, targets)),
            wide_rows(rows_of(features, joining)),
            into,
        )
    owner = torch.zeros(len(kept), tokens, dtype=torch.int64, device=features.device)
    owner = owner.scatter(1, slots, torch.arange(count + contextual, device=slots.device).expand_as(slots))
    owner = owner.scatter(1, joining, into + count)
    rows = torch.cat([rows_of(features, kept), merged.to(features.dtype)], dim=1)
    return Reduction(rows, slots, owner, tokens)


def _target_and_mean(targets: torch.Tensor, joining: torch.Tensor, into: torch.Tensor) -> tuple[torch.Tensor]:
    member = torch.arange(targets.shape[1], device=into.device)[:, None] == into[:, None]
    member = member.to(targets.dtype)
    return (targets + (member @ joining) / member.sum(dim=2, keepdim=True).clamp(min=1.0),)
