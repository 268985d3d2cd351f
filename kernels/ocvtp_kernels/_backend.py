"""Which implementation of an operation runs."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]

_log = logging.getLogger("ocvtp_kernels")
_said: set[str] = set()


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend can't run here. ``backend="auto"`` picks one that can."""


def resolve_backend(backend: str, op: str, device: torch.device) -> Literal["torch"]:
    """The backend that will run ``op`` on ``device``.

    An explicit request either holds or raises; only ``"auto"`` may fall back to the slower PyTorch
    reference on a GPU, and logs that once per operation.

    Raises:
        ValueError: ``backend`` is not a known name.
        BackendUnavailableError: ``"triton"`` was asked for and ``op`` has no Triton kernel.
    """
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be one of "auto", "triton", "torch"; got {backend!r}')
    if backend == "triton":
        raise BackendUnavailableError(
            f'{op} has no Triton kernel in this version; use backend="auto" or backend="torch"'
        )
    if backend == "auto" and device.type != "cpu" and not torch.compiler.is_compiling() and op not in _said:
        _said.add(op)
        _log.warning("%s runs its PyTorch reference on %s: no Triton kernel yet", op, device.type)
    return "torch"
