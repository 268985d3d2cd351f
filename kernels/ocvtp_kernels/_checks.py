"""Argument checks shared by the public functions. Shapes and dtypes only: no host synchronisation."""

from __future__ import annotations

import numbers
import operator
from typing import SupportsIndex, cast

import torch

from ocvtp_kernels._transforms import is_traced, values


def require_floating(name: str, tensor: object) -> torch.Tensor:
    """``tensor`` if it is a floating-point tensor, else ``TypeError``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {tensor.dtype}. Convert it with .float()")
    return tensor


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``shape``; ``None`` matches any size."""
    matches = tensor.ndim == len(shape)
    if matches:  # a plain loop: torch.compile in torch 2.7 can't trace a generator
        for dim, want in enumerate(shape):
            matches = matches and (want is None or want == tensor.shape[dim])
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {meaning} = [{wanted}]; got {list(tensor.shape)}")


def as_int(value: object) -> int | None:
    """``value`` as an int if it is a whole number, NumPy's and other libraries' too; else ``None``.

    That is what has ``__index__``, but for truth values.
    """
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(cast("SupportsIndex", value))
    except TypeError:
        return None


def as_float(value: object) -> float | None:
    """``value`` as a float if it is a real number and no whole one, NumPy's too; else ``None``."""
    if isinstance(value, float) or (
        isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
    ):
        return float(value)
    return None


def as_number(value: object) -> float | int | None:
    """``value`` as a float or an int if it is a real number, else ``None``; whole numbers stay whole."""
    number = as_float(value)
    return as_int(value) if number is None else number


def require_count(name: str, value: object, upper: int, upper_meaning: str) -> int:
    """``value`` if it is an int with 1 <= value <= upper, else ``TypeError`` or ``ValueError``."""
    count = as_int(value)
    if count is None:
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not 1 <= count <= upper:
        raise ValueError(f"{name} must be between 1 and {upper} ({upper_meaning}); got {count}")
    return count


def require(condition: torch.Tensor, message: str) -> None:
    """Raise ``ValueError`` unless ``condition``, a scalar bool tensor on a CPU, holds.

    In compiled code and where it is traced, by an assertion when that runs. Under ``vmap`` it must hold for
    all examples. Of a GPU's nothing is asserted: looking would wait for it, and an assertion on the device
    would end the process's CUDA context. Kernels have to survive what is wrong, and say so in their results.
    """
    if not torch.compiler.is_compiling():
        condition = values(condition)
        if condition.device.type == "cpu" and not is_traced(condition):
            if not condition.all():
                raise ValueError(message)
            return
    if condition.device.type == "cpu":
        torch._assert_async(condition.all() if condition.ndim else condition, message)


def require_int64(name: str, tensor: object) -> None:
    """Raise ``TypeError`` unless ``tensor`` is one of int64."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {getattr(tensor, 'dtype', type(tensor).__name__)}")
