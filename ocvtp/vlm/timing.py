"""Milliseconds per stage of the vision side, measured only while someone asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

STAGES = ("vision tower", "pruner", "projector")


class Clock:
    """Sums milliseconds per stage. Synchronises the device around every stage."""

    def __init__(self) -> None:
        self.times: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time spent inside to stage ``name``."""
        _synchronize(device)
        start = time.perf_counter()
        try:
            yield
            _synchronize(device)
        finally:
            self.times[name] += (time.perf_counter() - start) * 1e3


def stage(clock: Clock | None, name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Time a stage, or do nothing when no clock runs."""
    return contextlib.nullcontext() if clock is None else clock.stage(name, device)


@contextlib.contextmanager
def stage_times(model: Any) -> Iterator[dict[str, float]]:
    """Measure where the vision side of a patched model spends its time.

        with ocvtp.vlm.stage_times(model) as times:
            model.generate(**inputs)
        times["pruner"]                      # milliseconds, summed over the calls

    The stages are ``"vision tower"`` (up to the deepest consumed layer), ``"pruner"`` (fill scores and
    selection) and ``"projector"`` (on the kept rows). The device is synchronised around each of them, so
    their sum is more than what they cost in an undisturbed run. Outside of this context manager nothing is
    measured and nothing is synchronised.

    Raises:
        PatchError: ``model`` is not patched.
    """
    from ocvtp.vlm.patch import controller_of

    controller = controller_of(model)
    outer, clock = controller.clock, Clock()
    controller.clock = clock
    try:
        yield clock.times
    finally:
        controller.clock = outer


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
