"""GlobalCom2: a tiled picture's thumbnail says how much of each tile is kept, and is half of its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ocvtp.methods._inputs import best, check_share, check_tensor, wide
from ocvtp_kernels._checks import require_floating, require_shape


@dataclass(frozen=True)
class TiledChoice:
    """What is kept of one tiled picture.

    Attributes:
        thumbnail: ``[k]`` int64, the thumbnail's kept patches, best first: the first rows.
        tile: ``[rows]`` int64, the tile of each row after those, tiles counted in raster order; -1 of a
            newline embedding.
        place: ``[rows]`` int64, its patch in that tile; -1 of a newline.
        shares: ``[tiles]``, of its patches that each tile may keep.
    """

    thumbnail: torch.Tensor
    tile: torch.Tensor
    place: torch.Tensor
    shares: torch.Tensor


@torch.no_grad()
def globalcom2(
    thumbnail: torch.Tensor,
    tiles: torch.Tensor,
    ratio: float,
    *,
    shape: tuple[int, int],
    size: tuple[int, int],
) -> TiledChoice:
    """The best of a thumbnail, and of each tile a share that its part of the thumbnail decides.

    GlobalCom2, arXiv 2501.05179. A tile's share is ``ratio * (1 + p - mean(p))``, at most 1, with p the
    softmax of a tenth of the thumbnail's scores summed over the tile's part. Its scores are its own plus the
    thumbnail's there (bilinear), each scaled to length 1 over the patches that are not padding. Rows go by
    their true place in the picture, a newline after each of its rows; the published code loses places where
    there is padding. Waits for a GPU, since sizes depend on scores.

    Args:
        thumbnail: ``[N]`` finite floating point, class token's row of ``q k^T * scale`` of the last block,
            mean over heads, before the softmax. N patches make a square.
        tiles: ``[rows * columns, N]`` finite floating point, the same of each tile, in raster order.
        ratio: share of all patches to keep, from 0 to 1.
        shape: rows and columns of tiles.
        size: height and width of the picture in pixels, which say what is padding.

    Raises:
        TypeError, ValueError: a wrong type, shape or ratio, or NaN or Inf.
    """
    require_floating("thumbnail", thumbnail)
    require_shape("thumbnail", thumbnail, (None,), "[N]")
    check_tensor("thumbnail", thumbnail, (None,), "[N]", thumbnail)
    patches, ratio = thumbnail.shape[0], check_share("ratio", ratio)
    (rows, columns), side = shape, math.isqrt(patches)
    if side * side != patches or patches == 0:
        raise ValueError(f"thumbnail must be of a square of patches; got {patches}")
    check_tensor("tiles", tiles, (rows * columns, patches), "[tiles, N] of thumbnail", thumbnail)
    if min(size) < 1:
        raise ValueError(f"size must be the picture's height and width; got {size!r}")
    base = wide(thumbnail).reshape(side, side)
    shares = _shares(base, shape, ratio)
    down, across = _padding((rows * side, columns * side), size)
    whole = torch.nn.functional.interpolate(
        base[None, None], size=(rows * side - 2 * down, columns * side - 2 * across), mode="bilinear"
    )[0, 0]
    valid = _cut(torch.nn.functional.pad(torch.ones_like(whole), (across, across, down, down)), shape)
    ours = _cut(torch.nn.functional.pad(whole, (across, across, down, down)), shape)
    scores = _unit(wide(tiles) * valid) + _unit(ours)
    ranked = best(scores.masked_fill(valid == 0, float("-inf")), patches)
    counts = (valid.sum(dim=1) * shares).long()
    kept = torch.arange(patches, device=counts.device) < counts[:, None]
    tile, rank = kept.nonzero(as_tuple=True)
    tile, place = _with_newlines(tile, ranked[tile, rank], shape, side)
    return TiledChoice(best(thumbnail[None], int(patches * ratio))[0], tile, place, shares)


def _shares(base: torch.Tensor, shape: tuple[int, int], ratio: float) -> torch.Tensor:
    bands = base.tensor_split([len(base) * row // shape[0] for row in range(1, shape[0])], dim=0)
    cuts = [len(base) * column // shape[1] for column in range(1, shape[1])]
    parts = [part for band in bands for part in band.tensor_split(cuts, dim=1)]
    weights = (torch.stack([part.sum() for part in parts]) / 10).softmax(dim=0)
    return (ratio * (1 + weights - weights.mean())).clamp(max=1.0)


def _padding(patches: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns left of the picture that are padding; as many are below and right."""
    (height, width), (real_height, real_width) = patches, size
    if real_width / real_height > width / height:
        return (height - int(real_height * (width / real_width))) // 2, 0
    return 0, (width - int(real_width * (height / real_height))) // 2


def _cut(whole: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """``[rows * side, columns * side]`` as ``[rows * columns, side * side]``."""
    rows, columns = shape
    parts = whole.reshape(rows, whole.shape[0] // rows, columns, whole.shape[1] // columns)
    return parts.transpose(1, 2).reshape(rows * columns, -1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _with_newlines(
    tile: torch.Tensor, place: torch.Tensor, shape: tuple[int, int], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same patches by their place in the whole picture, a newline behind each of its rows."""
    rows, columns = shape
    width = columns * side
    y, x = tile // columns * side + place // side, tile % columns * side + place % side
    lines = torch.arange(rows * side, device=tile.device)
    order = torch.cat([y * (width + 1) + x, lines * (width + 1) + width]).argsort()
    newline = torch.full_like(lines, -1)
    return torch.cat([tile, newline])[order], torch.cat([place, newline])[order]
