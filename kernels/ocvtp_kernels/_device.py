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
