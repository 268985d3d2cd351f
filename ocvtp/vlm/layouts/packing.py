"""How an image is cut into tiles, and which placeholder each candidate belongs to.

LLaVA-NeXT and LLaVA-OneVision see a small whole picture and a grid of tiles. Their tokens are packed: the
whole picture's in raster order, then those of the stitched tiles without the rows or columns that only pad
the image to the grid's shape, a newline token after each row. LLaVA-OneVision shrinks stitched tiles that are
too many.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch

from ocvtp.vlm.contracts.rows import Piece
from ocvtp.vlm.contracts.settings import Newlines
from ocvtp_kernels._device import on_device


@dataclass(frozen=True)
class Packing:
    """The packed sequence of one image.

    Attributes:
        tiles: pictures it is cut into, the whole one among them.
        tokens: flat index (tile by tile) of the whole picture's tokens and of the stitched ones, in packed
            order before any shrinking: ``[n]`` int64.
        slots: ``[candidates]`` the placeholder of each candidate, ascending.
        newlines: placeholders of newlines, ascending.
        rows: ``[candidates]`` which newline ends a candidate's row, an index of ``newlines``; -1 for none.
        total: placeholders.
        stitched: rows and columns of the stitched tiles, without padding.
        shrunk: rows and columns that they are shrunk to, which make the candidates; ``None`` if they are not.
        grid: rows and columns of tiles, the whole picture not among them.
    """

    tiles: int
    tokens: torch.Tensor
    slots: torch.Tensor
    newlines: torch.Tensor
    rows: torch.Tensor
    total: int
    stitched: tuple[int, int] = (0, 0)
    shrunk: tuple[int, int] | None = None
    grid: tuple[int, int] = (0, 0)

    def to(self, device: torch.device) -> Packing:
        """The packing of the host on a device, by one copy that nobody waits for."""
        if device.type == "cpu":
            return self
        pinned = device.type == "cuda" and not torch.compiler.is_compiling()
        parts = on_device(self._pinned if pinned else self._joined(), device)
        names = ("tokens", "slots", "newlines", "rows")
        sizes = [len(getattr(self, name)) for name in names]
        return dataclasses.replace(self, **dict(zip(names, parts.split(sizes), strict=True)))

    @cached_property
    def _pinned(self) -> torch.Tensor:
        """Where a copy to a GPU need not wait."""
        with torch.inference_mode(False):
            return self._joined().pin_memory()

    def _joined(self) -> torch.Tensor:
        return torch.cat([self.tokens, self.slots, self.newlines, self.rows])


@lru_cache(maxsize=256)
def packing(
    height: int,
    width: int,
    pinpoints: tuple[tuple[int, int], ...],
    tile: int,
    side: int,
    most: int | None = None,
) -> Packing:
    """The packing of an image, on the CPU. The last few are remembered.

    Args:
        height: of the image in pixels, before any resizing.
        width: likewise.
        pinpoints: (height, width) in pixels of the grids that a model was trained with.
        tile: side of a tile in pixels.
        side: tokens along it.
        most: tiles' worth of tokens beyond which stitched tiles are shrunk; ``None``: never.
    """
    # What is made under inference mode could never be used for training.
    with torch.inference_mode(False):
        grid_height, grid_width = best_grid(height, width, pinpoints)
        down, across = grid_height // tile, grid_width // tile
        rows, columns = down * side, across * side
        top, left = _padding(height, width, rows, columns)
        y, x = torch.meshgrid(
            torch.arange(top, rows - top), torch.arange(left, columns - left), indexing="ij"
        )
        of_tile = 1 + (y // side) * across + x // side
        stitched = of_tile * side**2 + (y % side) * side + x % side
        shrunk = _shrunk(stitched.shape[0], stitched.shape[1], side, most)
        lines, length = stitched.shape if shrunk is None else shrunk
        whole = torch.arange(side**2)
        line = torch.arange(lines)[:, None]
        slots = side**2 + line * (length + 1) + torch.arange(length)
        return Packing(
            tiles=1 + down * across,
            tokens=torch.cat([whole, stitched.flatten()]),
            slots=torch.cat([whole, slots.flatten()]),
            newlines=side**2 + line[:, 0] * (length + 1) + length,
            rows=torch.cat([torch.full_like(whole, -1), line.expand(-1, length).flatten()]),
            total=side**2 + lines * (length + 1),
            stitched=(stitched.shape[0], stitched.shape[1]),
            shrunk=shrunk,
            grid=(down, across),
        )


@lru_cache(maxsize=16)
def whole_picture(side: int) -> Packing:
    """The packing of an image that is not cut, on the CPU: its tokens and one newline."""
    with torch.inference_mode(False):
        tokens = torch.arange(side**2)
        newline = torch.tensor([side**2])
        return Packing(1, tokens, tokens, newline, torch.zeros_like(tokens), side**2 + 1)


def packed_tokens(one: Packing, tiles: torch.Tensor) -> torch.Tensor:
    """What the model packs of an image, without newlines: ``[tiles, N, C] -> [candidates, C]``."""
    patches, tokens = tiles.shape[1], one.tokens.to(tiles.device)
    flat = tiles[torch.div(tokens, patches, rounding_mode="floor"), tokens % patches]
    if one.shrunk is None:
        return flat
    whole, stitched = flat[:patches], flat[patches:]
    return torch.cat([whole, shrink(stitched[None], one.stitched, one.shrunk)[0]])


def packed_piece(
    one: Packing,
    rows: torch.Tensor,
    newline: torch.Tensor,
    indices: torch.Tensor | None,
    kept_lines: Newlines,
    mass: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> Piece:
    """Rows of an image with its newlines, as the language model reads them.

    Args:
        one: how the image is packed.
        rows: ``[k, D]`` of candidates.
        newline: ``[D]``.
        indices: ``[k]``, the candidates they are of, ascending; ``None`` for all, with all newlines.
        kept_lines: which newlines stay of an image that drops candidates.
        mass: ``[k]``, how many candidates each row stands for.
        ended: from :func:`ended_lines`, where ``kept_lines`` are those of ``"rows"``.
    """
    if indices is None:
        slots, newlines = one.slots, one.newlines
    else:
        indices = indices.to(one.slots.device)
        slots, newlines = one.slots[indices], _kept_newlines(one, ended, kept_lines)
    slots = torch.cat([slots, newlines])
    rows = torch.cat([rows, newline.to(rows).expand(len(newlines), -1)])
    mass = None if mass is None else alone(mass, len(newlines))
    if indices is None or kept_lines != "last":
        slots, order = slots.sort()
        rows = rows[order.to(rows.device)]
        mass = None if mass is None else mass[order.to(mass.device)]
    return Piece(rows[None], slots[None], mass=None if mass is None else mass[None])


def alone(mass: torch.Tensor, more: int) -> torch.Tensor:
    """``[k + more]``: rows that the model adds stand for nobody but themselves."""
    return torch.nn.functional.pad(mass, (0, more), value=1.0)


def placeholders(one: Packing, keep: int, kept_lines: Literal["last", "all"]) -> int:
    """Rows of :func:`packed_piece` for an image that keeps ``keep`` candidates."""
    if keep == len(one.slots):
        return one.total
    return keep + (len(one.newlines) if kept_lines == "all" else 1)


def _kept_newlines(one: Packing, ended: torch.Tensor | None, kept_lines: Newlines) -> torch.Tensor:
    if kept_lines == "last":
        return one.newlines[-1:]
    if kept_lines == "all":
        return one.newlines
    assert ended is not None
    return ended


def ended_lines(packings: Sequence[Packing], indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of each image the placeholders of newlines whose rows keep a token.

    How many these are decides how long the prompt is, so the host waits for the device; once.

    Args:
        packings: of images.
        indices: ``[k]`` each, the candidates that they keep.
    """
    places, flags = [], []
    for one, kept in zip(packings, indices, strict=True):
        spare = len(one.newlines)  # -1, the whole picture, ends there
        lines = one.rows[kept.to(one.rows.device)] % (spare + 1)
        flag = torch.ones(spare + 1, dtype=torch.uint8, device=lines.device).index_fill_(0, lines, 0)[:-1]
        places.append(one.newlines[flag.sort(stable=True).indices])
        flags.append((flag == 0).sum())
    counts = torch.stack(flags).tolist()
    return [place[:count] for place, count in zip(places, counts, strict=True)]


def shrink(tokens: torch.Tensor, shape: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
    """``[b, rows * columns, C]`` in raster order, bilinearly interpolated to another shape."""
    picture = tokens.unflatten(1, shape).permute(0, 3, 1, 2).contiguous()
    small = torch.nn.functional.interpolate(picture, size=to, mode="bilinear")
    return small.flatten(2).transpose(1, 2)


def best_grid(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid, ``(height, width)`` in pixels, that shows most of an image, and of those wastes least."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - grid[0] * grid[1]

    return max(pinpoints, key=merit)


def _padding(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows of tokens above (and below), columns at either side, that only pad the image."""
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        return (rows - shown) // 2, 0
    shown = int(round(width * (rows / height), 7))
    return 0, (columns - shown) // 2


def _shrunk(rows: int, columns: int, side: int, most: int | None) -> tuple[int, int] | None:
    """What LLaVA-OneVision shrinks ``rows`` x ``columns`` stitched tokens to."""
    ratio = 0.0 if most is None else math.sqrt(rows * columns / (most * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else None
