"""Power laws through measured points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Fit(NamedTuple):
    """``y`` grows like ``x ** exponent`` between two values of ``x``.

    Attributes:
        exponent: the slope of the least-squares line through the logarithms.
        first: smallest ``x`` of the points it is through.
        last: largest ``x``.
        r2: share of the logarithms' variance that the line explains.
    """

    exponent: float
    first: float
    last: float
    r2: float

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"exponent": self.exponent, "from": self.first, "to": self.last, "r2": self.r2}


def power_law(points: Sequence[tuple[float, float]], least: int = 3) -> Fit | None:
    """The law of the upper half of ``points``, at least ``least`` of them, where constant costs matter less.

    ``None`` if there are fewer points, or any is not positive.
    """
    chosen = sorted(points)[-max(least, (len(points) + 1) // 2) :]
    if len(chosen) < least or any(x <= 0 or y <= 0 for x, y in chosen):
        return None
    xs, ys = ([math.log(point[i]) for point in chosen] for i in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    if not spread:
        return None
    exponent = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    variance = sum((y - y_mean) ** 2 for y in ys)
    left = sum((y - y_mean - exponent * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Fit(exponent, chosen[0][0], chosen[-1][0], 1.0 - left / variance if variance else 1.0)
