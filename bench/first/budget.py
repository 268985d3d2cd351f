"""Time for steps: a limit for each, and one for all."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds that are left.

    Args:
        seconds: for everything.
        clock: shows seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds until everything has to be done."""
        return max(0.0, self._end - self._clock())

    def allow(self, limit: float, least: float) -> float | None:
        """Seconds that a step may take: its limit or what is left; ``None`` if less than ``least``."""
        seconds = min(limit, self.left)
        return seconds if seconds >= least else None
