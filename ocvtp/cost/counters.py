"""Counts floating-point operations of whatever is called: by torch's formulas, or by fvcore's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Counter = Literal["torch", "fvcore"]
#: Runs a function and returns its floating-point operations.
Products = Callable[[Callable[[], object]], int]


def counter_of(name: Counter) -> Products:
    """A counter; both know the kernels of this package.

    Raises:
        ValueError: an unknown name.
        ImportError: no fvcore.
    """
    if name == "torch":
        return _by_torch
    if name != "fvcore":
        raise ValueError(f'counter must be "torch" or "fvcore"; got {name!r}')
    formulas = _fvcore_formulas()

    def by_fvcore(call: Callable[[], object]) -> int:
        with _Applying(formulas) as mode:
            call()
        return 2 * mode.multiply_adds

    return by_fvcore


def _by_torch(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


class _Value:
    """An argument as fvcore's formulas look at it: a value in a traced graph."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def isCompleteTensor(self) -> bool:
        return isinstance(self._value, torch.Tensor)

    def type(self) -> Any:
        return torch._C.TensorType.create_from_tensor(self._value) if self.isCompleteTensor() else None

    def toIValue(self) -> Any:
        return self._value


_Formula = Callable[[list[Any], list[Any]], Any]


def _fvcore_formulas() -> dict[str, _Formula]:
    """Operator name -> multiply-adds, for matrix products, convolutions and our kernels."""
    try:
        from fvcore.nn import jit_handles
    except ImportError as error:
        raise ImportError("the second counter needs fvcore: pip install fvcore") from error
    from ocvtp_kernels._library import fvcore_handles

    def convolution(inputs: list[Any], outputs: list[Any]) -> Any:
        shapes = [jit_handles.get_shape(value) for value in (*inputs[:2], outputs[0])]
        return jit_handles.conv_flop_count(*shapes, transposed=inputs[6].toIValue())

    return {
        "aten::mm": jit_handles.matmul_flop_jit,
        "aten::bmm": jit_handles.bmm_flop_jit,
        "aten::addmm": jit_handles.addmm_flop_jit,
        "aten::baddbmm": lambda inputs, outputs: jit_handles.bmm_flop_jit(inputs[1:3], outputs),
        "aten::convolution": convolution,
        **fvcore_handles(),
    }


class _Applying(TorchDispatchMode):
    """Applies fvcore's formulas to operators as they run: on the meta device, fvcore can't trace them."""

    def __init__(self, formulas: dict[str, _Formula]) -> None:
        super().__init__()
        self._formulas = formulas
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.name().partition(".")[0])
        if formula is not None:
            results = result if isinstance(result, (tuple, list)) else [result]
            self.multiply_adds += int(
                formula([_Value(one) for one in args], [_Value(one) for one in results])
            )
        return result
