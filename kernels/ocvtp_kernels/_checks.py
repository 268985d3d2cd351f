"""Argument checks shared by the public functions. Shapes and dtypes only: no host synchronisation."""

from __future__ import annotations

import torch


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


def require_count(name: str, value: object, upper: int, upper_meaning: str) -> int:
    """``value`` if it is an int with 1 <= value <= upper, else ``TypeError`` or ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not 1 <= value <= upper:
        raise ValueError(f"{name} must be between 1 and {upper} ({upper_meaning}); got {value}")
    return value


def require(condition: torch.Tensor, message: str) -> None:
    """Raise ``ValueError`` unless ``condition``, a scalar bool tensor, holds.

    On a GPU, and in compiled code, by an asynchronous assertion that costs no synchronisation.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
