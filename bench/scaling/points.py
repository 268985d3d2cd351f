"""One point of a curve: several things to time on the same input, each checked first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.e2e.memory import extra_bytes
from bench.e2e.watch import synchronize
from bench.harness import summarise
from bench.scaling.fit import power_law

Calls = Mapping[str, Callable[[], object]]


def point(x: int, calls: Calls, device: torch.device, seconds: float) -> dict[str, dict[str, Any]]:
    """Name of a call -> its time in turns with the others, memory and FLOPs at ``x``.

    FLOPs are those of products in operators that PyTorch or this package has a formula for: on a CPU not of
    fused attention.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        peak = extra_bytes(device, call)
        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = {"x": x, "peak_bytes": peak, "flops": counter.get_total_flops() or None}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            samples[name].append((time.perf_counter() - start) * 1e3)
    for name, values in samples.items():
        found[name]["ms"] = summarise(values).to_dict()
    return found


def curve(what: str, axis: str, fixed: Mapping[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """A curve as it is recorded, with the power laws of its upper half."""
    fits = {}
    for measure in ("ms", "peak_bytes", "flops"):
        values = [(one["x"], one[measure]) for one in points if one[measure] is not None]
        pairs = [(x, y["median"] if isinstance(y, dict) else y) for x, y in values]
        fit = power_law(pairs)
        fits[measure] = None if fit is None else fit.to_dict()
    return {"what": what, "axis": axis, "fixed": dict(fixed), "points": points, "fits": fits}
