"""A GPU far away: flags of images arrive when a test says so. Without one, the CPU plays it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ocvtp import watch


class Event:
    """Comes true when all that was sent has arrived."""

    def __init__(self, line: FarLine) -> None:
        self._line, self._sent = line, 0

    def record(self) -> None:
        self._line.sent += 1
        self._sent = self._line.sent

    def query(self) -> bool:
        return self._sent <= self._line.arrived

    def synchronize(self) -> None:
        self._line.waits += 1
        self._line.arrived = max(self._line.arrived, self._sent)


class FarLine(watch.Line):
    """Counts what a line does.

    Attributes:
        capturing: somebody records a graph.
    """

    device_type = "cpu"

    def __init__(self) -> None:
        self.sent = self.arrived = self.waits = self.places = 0
        self.capturing = False

    def around(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def recorded(self) -> bool:
        return self.capturing

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        self.places += 1
        return torch.zeros(size, dtype=dtype)

    def event(self) -> Any:
        return Event(self)

    def arrive(self) -> None:
        """The device has done everything so far."""
        self.arrived = self.sent
