"""Memory at its peak, and in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int | None:
    """The most memory in use during a call: allocated on a GPU, resident of the process on a CPU.

    ``None`` where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        _CLEAR.write_text("5")  # reset the high-water mark: Linux, proc(5)
    except OSError:
        return None
    call()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def cache_bytes(cache: Any) -> int:
    """Keys and values of one token of every prompt, in all layers; of a cache that may have room for more."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() // tensor.shape[-2] * tensor.element_size() for tensor in tensors)
