"""The highest of a row, of equals the first; and tokens to keep as numbers or shares."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ocvtp.pruner.budget import share_of
from ocvtp_kernels._checks import as_float, as_int
from ocvtp_kernels._device import on_device


def highest(scores: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
    """``[B, N]`` bool: the ``keep[b]`` highest of each row, of equals the first. Never waits for a GPU.

    Args:
        scores: ``[B, N]`` floating point, ``-inf`` on padding.
        keep: for each row, at most its tokens that are no padding.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(scores.shape[1], device=scores.device)[None] < per_row(keep, scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, first.expand_as(order))


def per_row(values: Sequence[int], device: torch.device) -> int | torch.Tensor:
    """One number where all rows have the same, else ``[B, 1]`` int64."""
    if len(set(values)) == 1:
        return values[0]
    return on_device(torch.tensor(values), device)[:, None]


def of_rows(table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``[B, S, D]`` and ``[B, R]`` -> ``[B, R, D]``: rows of ``table`` at ``columns``."""
    return table.gather(1, columns[:, :, None].expand(-1, -1, table.shape[2]))


def check_keep(name: str, keep: object) -> int | float:
    """``keep`` if it is a number of tokens or a share of them.

    Raises:
        TypeError, ValueError: it is neither.
    """
    share = as_float(keep)
    if share is not None:
        share_of(share, 1)
        return share
    count = as_int(keep)
    if count is None:
        raise TypeError(f"{name} must be a number of tokens or a share of them; got {keep!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1 token; got {count}")
    return count


def kept_of(keep: int | float, tokens: int) -> int:
    """What ``keep`` means for a prompt of ``tokens`` vision tokens: at most those."""
    if not tokens:
        return 0
    return share_of(keep, tokens) if isinstance(keep, float) else min(keep, tokens)


def check_layer(name: str, layer: object) -> int:
    """``layer`` if tokens can be dropped before it.

    Raises:
        TypeError, ValueError: it is none, or the first, before which nothing has attended yet.
    """
    number = as_int(layer)
    if number is None:
        raise TypeError(f"{name} must be a 0-based layer, an int; got {layer!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, as scores come from the layer before; got {number}")
    return number


def check_layers(name: str, layers: Sequence[object], least: int) -> tuple[int, ...]:
    """``layers`` if they are ascending 0-based layers from ``least`` on.

    Raises:
        TypeError, ValueError: they are not.
    """
    found = tuple(as_int(layer) for layer in layers)
    if not found or any(layer is None for layer in found):
        raise TypeError(f"{name} must be 0-based layers, ints; got {layers!r}")
    numbers = tuple(layer for layer in found if layer is not None)
    if numbers[0] < least or any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"{name} must be ascending from {least} on; got {list(numbers)}")
    return numbers
