"""Device state that an operation must not inherit from its caller."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch a surrounding autocast off: precision here is chosen, not inherited."""
    # By name, since torch 2.7 can't trace torch.amp.is_autocast_available.
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``, without a wait: a GPU copies from pinned memory behind the host.

    PyTorch's pinned memory is not given away before the copy is done, so ``tensor`` need not be kept.

    Args:
        tensor: on the CPU.
        device: where it is wanted.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
