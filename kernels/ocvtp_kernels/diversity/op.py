"""Diverse tokens for PyTorch: operator schemas, fake, FLOPs. A choice has no gradient."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._library import define, map_images

__all__ = ["farthest_points", "largest_volume"]


def _launch_farthest(x: torch.Tensor, keep: int, start: torch.Tensor | None = None) -> torch.Tensor:
    from ocvtp_kernels.diversity import triton as kernels

    return kernels.farthest_points(x, keep, start=start)


def _launch_volume(x: torch.Tensor, keep: int) -> torch.Tensor:
    from ocvtp_kernels.diversity import triton as kernels

    return kernels.largest_volume(x, keep)


def _fake(x: torch.Tensor, keep: int, start: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(x.shape[0], keep, dtype=torch.int64)


def _flops(x: Any, keep: int, *_: Any, **__: Any) -> int:
    """Every token against every kept one but the last."""
    batch, tokens, width = x
    return int(2 * batch * tokens * width * (keep - 1))


_farthest_points = define(
    "farthest_points(Tensor x, SymInt keep, Tensor? start=None) -> Tensor", _launch_farthest, _fake, _flops
)
_largest_volume = define("largest_volume(Tensor x, SymInt keep) -> Tensor", _launch_volume, _fake, _flops)

map_images(_farthest_points)
map_images(_largest_volume)


def farthest_points(x: torch.Tensor, keep: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, keep]`` in the order of choice, after those of ``start`` ``[B, keep]`` that are not -1."""
    chosen: torch.Tensor = _farthest_points(x, keep, start)
    return chosen


def largest_volume(x: torch.Tensor, keep: int) -> torch.Tensor:
    """``[B, keep]`` in the order of choice."""
    chosen: torch.Tensor = _largest_volume(x, keep)
    return chosen
