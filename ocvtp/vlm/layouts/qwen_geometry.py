"""Where the patches of Qwen-VL towers are: orders, bounds and positions, from the grids alone.

A processor delivers patches block-major: ``merge ** 2`` consecutive rows are one merged unit, units in raster
order, frame after frame. Qwen2.5-VL permutes the units, so that each attention window is consecutive.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

Grid = tuple[int, int, int]  # frames, rows and columns of patches of an image or video


@dataclass(frozen=True)
class Corners:
    """What each patch reads of a square table of position embeddings, bilinearly, corners aligned.

    Attributes:
        indices: ``[patches, 4]`` rows of the table.
        weights: ``[patches, 4]`` float32.
    """

    indices: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Geometry:
    """Patches of a batch of images and videos, in the order of the tower. All tensors are on the CPU.

    Attributes:
        positions: ``[patches, 2]`` row and column of each patch in its picture.
        order: ``[units]`` the unit at each place of the tower; ``None`` where the tower keeps the order.
        places: ``[units]`` the inverse: where the tower has each unit.
        frames: ``[frames + 1]`` int32 bounds of the frames, in patches.
        windows: ``[windows + 1]`` int32 bounds of the attention windows, likewise.
        longest_frame: patches.
        longest_window: patches.
        equal_frames: length of frames, how many frames have it, and their patches ``[count * length]``
            (``None``: all patches).
    """

    positions: torch.Tensor
    order: torch.Tensor | None
    places: torch.Tensor | None
    frames: torch.Tensor
    windows: torch.Tensor
    longest_frame: int
    longest_window: int
    equal_frames: tuple[tuple[int, int, torch.Tensor | None], ...]


def as_grids(grid_thw: torch.Tensor | Sequence[Sequence[int]], merge: int) -> tuple[Grid, ...]:
    """``grid_thw`` as plain numbers; the one place that waits for a GPU, if they are there.

    Raises:
        ValueError: grids that are not ``[n, 3]`` of whole merged units.
    """
    rows = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else list(grid_thw)
    if not rows or any(not isinstance(row, Sequence) or len(row) != 3 for row in rows):
        raise ValueError(f"grids must be frames, rows and columns of each image or video; got {rows}")
    grids = tuple((int(t), int(h), int(w)) for t, h, w in rows)
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(
                f"a grid of {t} x {h} x {w} patches has no whole {merge} x {merge} units; "
                "resize the image as the model's processor does"
            )
    return grids


def patchify(pictures: torch.Tensor, patch: int, merge: int, frames: int) -> torch.Tensor:
    """Still pictures as a processor delivers them: patches unit by unit, each seen ``frames`` times.

    Args:
        pictures: ``[b, 3, H, W]``, normalised.
        patch: pixels along the side of a patch.
        merge: patches along the side of a unit.
        frames: that a patch spans.

    Returns:
        ``[b * patches, 3 * frames * patch ** 2]``.

    Raises:
        ValueError: sides that are not whole units.
    """
    height, width = pictures.shape[2:]
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"pictures of {width} x {height} pixels have no whole units of {patch * merge}")
    rows, columns = height // (patch * merge), width // (patch * merge)
    cut = pictures.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
    # [b, 3, rows, merge, patch, columns, merge, patch] -> a row of values for each patch
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = ordered.expand(*ordered.shape[:6], frames, *ordered.shape[7:])
    return repeated.reshape(-1, 3 * frames * patch * patch)


@lru_cache(maxsize=8)
def geometry(grids: tuple[Grid, ...], merge: int, window: int | None, pinned: bool) -> Geometry:
    """Orders, bounds and positions of the patches of ``grids``.

    Args:
        grids: of a batch.
        merge: patches along the side of a merged unit.
        window: units along the side of an attention window; ``None`` if all attention is full.
        pinned: whether to put the tensors where copies to a GPU need not wait for them.
    """
    # What is made under inference mode could never be used for training.
    with torch.inference_mode(False):
        positions = torch.cat([_positions(grid, merge) for grid in grids])
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        order = places = None
        windows = lengths
        if window is not None:
            parts = [_windows(grid, merge, window) for grid in grids]
            starts = itertools.accumulate((len(part) for part, _ in parts), initial=0)
            order = torch.cat([part + start for (part, _), start in zip(parts, starts, strict=False)])
            places = order.argsort()
            positions = positions.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
            windows = [length for _, lengths_of_one in parts for length in lengths_of_one]
        tensors = (positions, order, places, _bounds(lengths), _bounds(windows))
        positions, order, places, frames, bounds = (_pin(tensor, pinned) for tensor in tensors)
        return Geometry(
            positions,
            order,
            places,
            frames,
            bounds,
            max(lengths),
            max(windows),
            tuple((length, count, _pin(rows, pinned)) for length, count, rows in _equal(lengths)),
        )


@lru_cache(maxsize=8)
def corners(grids: tuple[Grid, ...], merge: int, side: int, closed_form: bool, pinned: bool) -> Corners:
    """How ``grids`` sample a table of ``side * side`` position embeddings.

    Args:
        grids: of a batch.
        merge: patches along the side of a merged unit.
        side: of the table.
        closed_form: round as transformers >= 5.17 does; as ``torch.linspace`` otherwise.
        pinned: whether to put the tensors where copies to a GPU need not wait for them.
    """
    with torch.inference_mode(False):
        indices, weights = [], []
        for grid in grids:
            (row_at, row_weight), (column_at, column_weight) = (
                _samples(size, side, closed_form) for size in grid[1:]
            )
            rows, columns = _positions(grid, merge).unbind(-1)
            indices.append((row_at[rows, :, None] * side + column_at[columns, None, :]).flatten(1))
            weights.append((row_weight[rows, :, None] * column_weight[columns, None, :]).flatten(1))
        return Corners(_pin(torch.cat(indices), pinned), _pin(torch.cat(weights), pinned))


def _positions(grid: Grid, merge: int) -> torch.Tensor:
    """``[patches, 2]``: row and column of each patch, block-major."""
    t, h, w = grid
    raster = torch.arange(h * w).view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
    return torch.stack([raster // w, raster % w], dim=-1).repeat(t, 1)


def _windows(grid: Grid, merge: int, window: int) -> tuple[torch.Tensor, list[int]]:
    """Units window by window ``[units]``, raster order in each, and patches of each window."""
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    row, column = torch.arange(h)[:, None] // window, torch.arange(w)[None, :] // window
    number = (row * -(-w // window) + column).flatten()  # of each unit's window
    frame = number.argsort(stable=True)
    units = torch.cat([frame + i * h * w for i in range(t)])
    return units, (number.bincount() * merge**2).tolist() * t


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    """``[n + 1]`` int32, as FlashAttention wants it."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _equal(lengths: Sequence[int]) -> list[tuple[int, int, torch.Tensor | None]]:
    """Frames of one length together."""
    starts: dict[int, list[int]] = {}
    for length, start in zip(lengths, itertools.accumulate(lengths, initial=0), strict=False):
        starts.setdefault(length, []).append(start)
    if len(starts) == 1:
        return [(lengths[0], len(lengths), None)]
    return [
        (length, len(first), (torch.tensor(first)[:, None] + torch.arange(length)).flatten())
        for length, first in starts.items()
    ]


def _samples(size: int, side: int, closed_form: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two table rows ``[size, 2]`` for each patch along one side of a picture, and their weights."""
    if closed_form:
        at = torch.arange(size).float() * (side - 1) / torch.tensor(max(size - 1, 1))
    else:
        at = torch.linspace(0, side - 1, size)
    low = at.floor()
    over = at - low
    # Equal in real numbers; releases differ in how they round the second.
    second = (1 - (over - 1).abs()).clamp(min=0) if closed_form else over
    near = torch.stack([low, low + 1], dim=-1).long().clamp(max=side - 1)
    return near, torch.stack([1 - over, second], dim=-1)


def _pin(tensor: Any, pinned: bool) -> Any:
    return tensor.pin_memory() if pinned and tensor is not None else tensor
