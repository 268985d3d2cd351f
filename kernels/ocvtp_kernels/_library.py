"""Operators of this package in PyTorch's dispatcher, and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ocvtp_kernels._backend import BackendUnavailableError
from ocvtp_kernels._launch import MAX_IMAGES

# The package's name: from a kernel hub it has another one, and operators of both may be in one process.
_NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
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


def map_images(operator: Any) -> None:
    """Let ``torch.vmap`` run an operator whose tensors, taken and given, all have images first."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_images(operator, info, in_dims, *arguments)

    torch.library.register_vmap(operator.name(), rule, lib=_library)


def fold_images(
    function: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """A rule for ``torch.vmap``: one call in which the images of all examples are the images.

    Args:
        function: whose tensors, taken and given, all have images first.
        info, in_dims, arguments: as ``torch.autograd.Function.vmap`` has them.

    Raises:
        BackendUnavailableError: more images than a launch takes.
    """
    examples = info.batch_size

    def folded(argument: Any, dim: int | None) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        each = argument.expand(examples, *argument.shape) if dim is None else argument.movedim(dim, 0)
        if examples * each.shape[1] > MAX_IMAGES:
            raise BackendUnavailableError(
                f"vmap makes {examples} x {each.shape[1]} images, and the Triton kernels take up to "
                f'{MAX_IMAGES}. Use chunk_size=, or backend="torch"'
            )
        return each.flatten(0, 1)

    found = function(*map(folded, arguments, in_dims))
    many = isinstance(found, tuple)
    results = tuple(
        result.unflatten(0, (examples, result.shape[0] // examples))
        for result in (found if many else (found,))
    )
    return (results, (0,) * len(results)) if many else (results[0], 0)


def one_by_one(
    function: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """A rule for ``torch.vmap``: a call for each example. For a function of one result."""
    results = [
        function(
            *(
                argument if dim is None else argument.select(dim, example)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for example in range(info.batch_size)
    ]
    return torch.stack(results), 0


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
