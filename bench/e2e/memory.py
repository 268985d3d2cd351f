"""Memory at its peak, and in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Now and then the profiler returns no event at all, of calls that have thousands.
_TRIES = 3


def extra_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """The most memory that a call takes at a time, on top of what tensors hold before it.

    On a GPU what its allocator says, on a CPU the sum of all allocations and releases in their order: the
    same in every run. (What the system says is resident does not shrink when a tensor dies.)
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    changes: list[Any] = []
    for _ in range(_TRIES):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        results: Any = profiler.profiler
        changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        if changes:
            break
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def held_bytes(device: torch.device, *modules: torch.nn.Module) -> int:
    """What tensors hold: on a GPU all of them, on a CPU the parameters and buffers of ``modules``."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def cache_bytes(cache: Any) -> int:
    """Keys and values of one token of every prompt, in all layers; of a cache that may have room for more."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() // tensor.shape[-2] * tensor.element_size() for tensor in tensors)
