"""Time for steps: a limit for each, and one for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


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

    def allow(self, limit: float, least: float, later: Iterable[float] = ()) -> float | None:
        """Seconds that a step may take; ``None`` if fewer than ``least`` are left.

        Args:
            limit: at most.
            least: without which it isn't worth a start.
            later: what each of the steps behind it needs at least. They get it, as far as that fits.
        """
        left = self.left
        if left < least:
            return None
        kept = 0.0
        for needed in later:
            kept += needed if kept + needed <= left - least else 0.0
        return min(limit, left - kept)
