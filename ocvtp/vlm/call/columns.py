"""Where the caller's columns went: a field of outputs, and the way back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from ocvtp.vlm.call.prompt import short_columns


def lengthen(values: torch.Tensor, columns: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """What an output says of every column, at the columns that the caller has in hand.

    Args:
        values: ``[B, n, ...]``: ``logits``, a hidden state, anything per column of the short sequence or of
            its end (an integer ``logits_to_keep``).
        columns: ``[B, long]`` of the same output, see :func:`ocvtp.apply`.
        fill: for columns that were dropped, or that ``values`` doesn't reach.

    Returns:
        ``[B, long, ...]``, differentiable.

    Raises:
        ValueError: the two are not of one output.
    """
    if columns.ndim != 2 or values.ndim < 2 or len(columns) != len(values):
        raise ValueError(
            f"values [B, n, ...] and columns [B, long] must be of one output; got {list(values.shape)} and "
            f"{list(columns.shape)}"
        )
    columns = columns.to(values.device)
    # The last column of the short sequence is never a new one, so it is somebody's.
    where = columns - (columns.amax() + 1 - values.shape[1])
    where = torch.where(columns < 0, -1, where)
    for _ in range(values.ndim - 2):
        where = where[..., None]
    found = torch.gather(values, 1, where.clamp(min=0).expand(-1, -1, *values.shape[2:]))
    return found.masked_fill(where < 0, fill)


def with_columns(output: Any, index: torch.Tensor, long: int) -> Any:
    """``output`` with a field ``columns`` ``[B, long]``.

    Args:
        output: of ``forward`` or ``generate``.
        index: ``[B, short]`` long column of every short one, -1 for padding.
        long: columns of the caller's ``input_ids``.
    """
    from transformers.utils import ModelOutput

    if not isinstance(output, ModelOutput):
        return output
    kind: Any = type(output)
    return _with_field(kind)(**output, columns=short_columns(index, long))


@torch.compiler.assume_constant_result  # a class can't be made while something traces
def _with_field(kind: type) -> Any:
    return _made(kind)


@functools.cache
def _made(kind: type) -> Any:
    """The class of an output with one more field: a real one, which survives pytrees and accelerate."""
    if "columns" in {field.name for field in dataclasses.fields(kind)}:
        return kind

    def reduce(self: Any) -> tuple[Any, ...]:  # pickle finds no class by a name that another has
        return _rebuilt, (kind, dict(self.items()))

    field = ("columns", "torch.LongTensor | None", dataclasses.field(default=None))
    return dataclasses.make_dataclass(kind.__name__, [field], bases=(kind,), namespace={"__reduce__": reduce})


def _rebuilt(kind: type, items: dict[str, Any]) -> Any:
    return _with_field(kind)(**items)
