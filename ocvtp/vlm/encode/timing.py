"""Milliseconds per stage of the vision side, measured only while someone asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

STAGES = ("vision tower", "pruner", "projector")


class Clock:
    """Sums milliseconds per stage. Synchronises the device around every stage."""

    def __init__(self) -> None:
        self.times: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time spent inside to stage ``name``."""
        synchronize(device)
        start = time.perf_counter()
        try:
            yield
            synchronize(device)
        finally:
            self.times[name] += (time.perf_counter() - start) * 1e3


def stage(clock: Clock | None, name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Time a stage, or do nothing when no clock runs."""
    return contextlib.nullcontext() if clock is None else clock.stage(name, device)


def synchronize(device: torch.device) -> None:
    """Wait for what ``device`` was given to do."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
