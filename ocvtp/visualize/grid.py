"""Patches of a picture: what is said of them, checked, and where they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ocvtp.visualize.colours import INK


def attention_of(values: npt.ArrayLike, grid: tuple[int, int] | None = None) -> npt.NDArray[np.float64]:
    """``[K, N]`` of one image, checked."""
    attention = np.asarray(values, dtype=np.float64)
    if attention.ndim != 2 or 0 in attention.shape:
        raise ValueError(f"slot_attention must be [K, N] of one image; got shape {list(attention.shape)}")
    if grid is not None and attention.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"slot_attention has {attention.shape[1]} tokens and the grid {grid[0]} x {grid[1]} patches"
        )
    return attention


def tokens_of(name: str, values: npt.ArrayLike, grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """``[keep]`` different tokens of one image, checked."""
    tokens = np.asarray(values)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{name} must be [keep] integers of one image; got shape {list(tokens.shape)}, {tokens.dtype}"
        )
    count = grid[0] * grid[1]
    if tokens.size and (tokens.min() < 0 or tokens.max() >= count):
        raise ValueError(f"{name} must lie in [0, {count}); got {tokens.min()} to {tokens.max()}")
    if len(np.unique(tokens)) != len(tokens):
        raise ValueError(f"{name} holds an index twice")
    return tokens.astype(np.int64)


def owners_of(
    values: npt.ArrayLike, kept: npt.NDArray[np.int64], grid: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """``[N]`` positions among ``kept``, checked: of every token, and of a kept one its own."""
    owner = np.asarray(values)
    count = grid[0] * grid[1]
    if owner.shape != (count,) or not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(
            f"owner must be [{count}] integers, one for each patch; got shape {list(owner.shape)}, "
            f"{owner.dtype}"
        )
    if owner.min() < 0 or owner.max() >= len(kept):
        raise ValueError(
            f"owner must lie in [0, {len(kept)}), positions among kept; got {owner.min()} to {owner.max()}"
        )
    if not np.array_equal(owner[kept], np.arange(len(kept))):
        raise ValueError("owner must give every kept token to itself")
    return owner.astype(np.int64)


def slot_picks(slot_attention: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Each slot's top token, ties to the lower index: ``[K, N]`` -> ``[K]`` int64."""
    return np.argmax(attention_of(slot_attention), axis=1)


def grow(image: Image.Image, grid: tuple[int, int], scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """The enlarged picture and the (height, width) of one patch in it."""
    rows, columns = grid
    width, height = image.size
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(
            f"a grid of {rows} x {columns} patches does not divide an image {height} pixels high "
            f"and {width} wide"
        )
    if scale < 1:
        raise ValueError(f"scale must be at least 1; got {scale}")
    picture = image.convert("RGB")
    if scale > 1:
        picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return picture, (height // rows * scale, width // columns * scale)


def spread(per_patch: npt.NDArray[np.generic], patch: tuple[int, int]) -> npt.NDArray[np.generic]:
    """A value for each patch as one for each pixel."""
    return per_patch.repeat(patch[0], axis=0).repeat(patch[1], axis=1)


def line_width(patch: tuple[int, int]) -> int:
    """Pixels of a frame around a patch."""
    return max(1, min(patch) // 10)


def box(token: int, grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last column and row of a token's pixels: left, top, right, bottom."""
    row, column = divmod(token, grid[1])
    top, left = row * patch[0], column * patch[1]
    return left, top, left + patch[1] - 1, top + patch[0] - 1


def draw_borders(
    draw: ImageDraw.ImageDraw, owner: npt.NDArray[np.int64], patch: tuple[int, int], width: int
) -> None:
    """Lines where patches that touch differ in ``owner`` ``[h, w]``."""
    high, wide = patch
    for row, column in np.argwhere(owner[:, 1:] != owner[:, :-1]).tolist():
        x = (column + 1) * wide
        draw.line((x, row * high, x, (row + 1) * high), INK, width)
    for row, column in np.argwhere(owner[1:] != owner[:-1]).tolist():
        y = (row + 1) * high
        draw.line((column * wide, y, (column + 1) * wide, y), INK, width)
