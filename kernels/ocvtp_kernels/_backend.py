"""Which implementation of an operation runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, get_args

import torch

from ocvtp_kernels._arch import interpreting, why_no_kernels
from ocvtp_kernels._transforms import transforms_active

Backend = Literal["auto", "triton", "torch"]

_log = logging.getLogger("ocvtp_kernels")
_said: set[str] = set()


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend can't run here. ``backend="auto"`` picks one that can."""


def resolve_backend(
    backend: str, op: str, device: torch.device, unsupported: Callable[[], str | None] = lambda: None
) -> Literal["triton", "torch"]:
    """The backend that will run ``op`` on ``device``.

    An explicit request either holds or raises; only ``"auto"`` may fall back to the slower PyTorch
    reference on a GPU, and logs that once per operation and reason.

    Args:
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        op: name of the operation.
        device: of its tensors.
        unsupported: asked last; why the kernel can't take these very arguments, if so.

    Raises:
        ValueError: ``backend`` is not a known name.
        BackendUnavailableError: ``"triton"`` was asked for and can't run; says why.
    """
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be one of "auto", "triton", "torch"; got {backend!r}')
    if backend == "torch":
        return "torch"
    if backend == "auto" and device.type == "cpu":
        return "torch"
    reason = _why_not(device.type, device.index) or _untraceable() or unsupported()
    if reason is None:
        return "triton"
    if backend == "triton":
        raise BackendUnavailableError(
            f'{op} can\'t run its Triton kernel: {reason}. Use backend="auto" or backend="torch"'
        )
    _say_once(op, reason)
    return "torch"


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return interpreting()


@torch.compiler.assume_constant_result
def _why_not(device_type: str, index: int | None) -> str | None:
    return why_no_kernels(
        torch.device(device_type, index) if index is not None else torch.device(device_type)
    )


def _untraceable() -> str | None:
    if transforms_active() and torch.compiler.is_compiling():
        return "its derivatives and its vmap can't be compiled inside a transform of torch.func"
    return None


def _say_once(op: str, reason: str) -> None:
    message = f"{op} runs its PyTorch reference: {reason}"
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _log.warning(message)
