"""Shapes as signed distances: negative inside, in units of the shape's radius."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.95


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.82


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (1.25 * abs(x) + abs(y) - 1.1) / 1.6


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.52


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    upright = np.maximum(abs(x) - 0.33, abs(y) - 0.95)
    level = np.maximum(abs(x) - 0.95, abs(y) - 0.33)
    return np.minimum(upright, level)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return abs(np.hypot(x, y) - 0.7) - 0.27


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.98, 0.8 - np.hypot(x - 0.5, y))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = np.pi / 5
    angle = np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector
    radius = np.hypot(x, y)
    # Along an edge from the tip (1.05, 0) to the notch (0.45 at half a sector).
    along, across = radius * np.cos(angle), radius * abs(np.sin(angle))
    notch = 0.45 * np.cos(sector), 0.45 * np.sin(sector)
    edge = notch[0] - 1.05, notch[1]
    length = np.hypot(*edge)
    return ((along - 1.05) * edge[1] - across * edge[0]) / length


SHAPES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}

#: How far a shape may turn either way and still be called by its name, in radians.
TURNS = dict.fromkeys(SHAPES, 0.2) | {"circle": 3.14, "ring": 3.14, "star": 0.6, "moon": 3.14}

#: Shapes with room for a letter in the middle.
ROOMY = ("circle", "square", "diamond")
