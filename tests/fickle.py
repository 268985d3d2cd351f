"""A library that rounds by the layout and the size of its operands, on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ROUNDED = {
    _aten.mm.default,
    _aten.mv.default,
    _aten.dot.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.addmv.default,
    _aten.baddbmm.default,
    _aten.sum.dim_IntList,
    _aten.mean.dim,
}


class Fickle(TorchDispatchMode):
    """Products and sums differ in some last bits as soon as the shape or a stride of an operand does.

    Real libraries do so for some shapes and on some machines. What is the same bits here rests on no chance.
    """

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: object,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if function not in _ROUNDED or not result.is_floating_point():
            return result
        operands = [_layout(x) for x in arguments if isinstance(x, torch.Tensor)]
        draw = torch.Generator().manual_seed(zlib.crc32(repr((str(function), operands)).encode()))
        moved = torch.rand(result.shape, generator=draw, dtype=torch.float32) < 0.3
        return torch.where(moved, result * (1 + 2 * torch.finfo(result.dtype).eps), result)


def _layout(x: torch.Tensor) -> tuple[tuple[int, ...], list[int]]:
    """Shape, and the strides that mean something."""
    return tuple(x.shape), [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
