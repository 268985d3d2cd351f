"""One point of a curve: several things to time on the same input, each checked first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import ocvtp
from bench.e2e.memory import extra_bytes
from bench.e2e.methods import OURS, UNPRUNED
from bench.e2e.watch import synchronize
from bench.harness import Timing, interleaved
from bench.scaling.fit import power_law
from ocvtp import OCPruner

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
    for name, timing in timed(calls, device, seconds).items():
        found[name]["ms"] = timing.to_dict()
    return found


def timed(calls: Calls, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Times of calls in turns, until a GPU is done with each."""

    def to_the_end(call: Callable[[], object]) -> None:
        call()
        synchronize(device)

    turns = {name: functools.partial(to_the_end, call) for name, call in calls.items()}
    return interleaved(turns, seconds=seconds, least=3)


def unpruned_and_ours(model: Any, pruner: OCPruner, keep: int, call: Callable[[], object]) -> Calls:
    """The same call of a model as it is, and with a pruner."""

    def ours() -> None:
        with ocvtp.pruned(model, pruner, keep=keep):
            call()

    return {UNPRUNED: call, OURS: ours}


def curve(what: str, axis: str, fixed: Mapping[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """A curve as it is recorded, with the power laws of its upper half."""
    fits = {}
    for measure in ("ms", "peak_bytes", "flops"):
        values = [(one["x"], one[measure]) for one in points if one[measure] is not None]
        pairs = [(x, y["median"] if isinstance(y, dict) else y) for x, y in values]
        fit = power_law(pairs)
        fits[measure] = None if fit is None else fit.to_dict()
    return {"what": what, "axis": axis, "fixed": dict(fixed), "points": points, "fits": fits}
