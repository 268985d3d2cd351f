"""Operators of this package in PyTorch's dispatcher, and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_NAMESPACE = "ocvtp_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")

#: Operator name -> count, for ``fvcore.nn.FlopCountAnalysis(...).set_op_handle(**fvcore_handles())``.
_fvcore: dict[str, Callable[[list[Any], list[Any]], int]] = {}
_launchers: dict[str, Callable[..., Any]] = {}


def define(
    schema: str, launch: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]
) -> Any:
    """Register an operator and return it.

    ``Library.define`` rather than ``custom_op``: 1.6 against 7 us a call (TensorRT-LLM PR 13149).

    Args:
        schema: name, arguments and results, as ``torch.library`` takes them.
        launch: runs it on CUDA tensors, or on CPU tensors in Triton's interpreter.
        fake: makes empty results of the same shape, dtype and device.
        flops: floating-point operations, from the shapes of the arguments (tensors become shapes); called
            as :func:`torch.utils.flop_counter.register_flop_formula` has it.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CUDA", "CPU"):
        _library.impl(name, launch, key)
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    _launchers[f"{_NAMESPACE}::{name}"] = launch
    packet = getattr(getattr(torch.ops, _NAMESPACE), name)
    register_flop_formula(packet)(flops)
    _fvcore[f"{_NAMESPACE}::{name}"] = lambda inputs, outputs: flops(*map(_shape, inputs)) // 2
    return packet.default


def handle_function(function: type[torch.autograd.Function], flops: Callable[..., int]) -> None:
    """Let fvcore count an autograd function, which it sees in place of the operators inside.

    ``flops`` takes the shapes of the tensors among the function's arguments.
    """
    _fvcore[f"prim::PythonOp.{function.__name__}"] = lambda inputs, _: flops(*map(_shape, inputs)) // 2


def launchers() -> dict[str, Callable[..., Any]]:
    """Operator name -> what it runs on a GPU, for whoever counts that without one.

    Import the operations that are counted first.
    """
    return dict(_launchers)


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Operator name -> handle for fvcore, which counts a multiply-add as one operation.

    Usage: ``FlopCountAnalysis(model, inputs).set_op_handle(**fvcore_handles())``. Import the operations that
    the model uses first.
    """
    return dict(_fvcore)


def _shape(value: Any) -> Any:
    """Shape of a traced tensor, or the value of a traced constant."""
    if isinstance(value.type(), torch._C.TensorType):
        return value.type().sizes()
    return value.toIValue()
