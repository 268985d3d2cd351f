"""Scenes as pixels: cluttered backgrounds, then the things, then their letters."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

from bench.testbed.glyphs import HEIGHT, WIDTH, bitmap
from bench.testbed.scenes import SIDE, Scene, Thing
from bench.testbed.shapes import SHAPES

#: Hue, saturation and value.
_HUES = {
    "red": (0.0, 0.9, 0.85),
    "orange": (0.075, 0.95, 0.98),
    "yellow": (0.155, 0.9, 0.98),
    "green": (0.34, 0.85, 0.62),
    "cyan": (0.5, 0.75, 0.95),
    "blue": (0.62, 0.9, 0.85),
    "purple": (0.78, 0.75, 0.72),
    "white": (0.0, 0.0, 0.97),
}
_DARKER = 0.5  # the second shade of a texture
_INK = 0.04


def paint(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """``[128, 128, 3]`` uint8, and ``[128, 128]`` int8: the number of the thing at every pixel, or -1."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(rng)
    owner = np.full((SIDE, SIDE), -1, dtype=np.int8)
    for number, thing in enumerate(scene.things):
        _draw(canvas, owner, thing, number, rng)
    canvas += rng.normal(0, rng.uniform(0.0, 0.02), canvas.shape).astype(np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), owner


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted clouds of several scales, with strokes and specks: no shape, no bright colour."""
    canvas = np.zeros((SIDE, SIDE, 3), dtype=np.float32)
    roughness = rng.uniform(0.35, 0.75)
    total = 0.0
    for octave, cells in enumerate((2, 4, 8, 16, 32)):
        weight = roughness**octave
        colors = (rng.random((cells, cells, 3)) * 255).astype(np.uint8)
        cloud = Image.fromarray(colors).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas += weight * np.asarray(cloud, dtype=np.float32) / 255
        total += weight
    canvas /= total
    grey = canvas.mean(axis=2, keepdims=True)
    canvas = grey + rng.uniform(0.1, 0.5) * (canvas - grey)
    low, high = rng.uniform(0.02, 0.3), rng.uniform(0.4, 0.75)
    canvas = low + (high - low) * np.clip(1.6 * (canvas - 0.5) + 0.5, 0, 1)
    return _clutter(canvas, rng)


def _clutter(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray((canvas * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 25))):
        x, y = rng.uniform(0, SIDE, 2)
        dx, dy = rng.normal(0, 12, 2)
        shade = rng.uniform(40, 190) + rng.uniform(-15, 15, 3)
        color = tuple(int(c) for c in np.clip(shade, 0, 255))
        if rng.random() < 0.6:
            pen.line((x, y, x + dx, y + dy), fill=color, width=1)
        else:
            pen.ellipse((x, y, x + 1.5, y + 1.5), fill=color)
    return np.asarray(picture, dtype=np.float32) / 255


def _draw(canvas: np.ndarray, owner: np.ndarray, thing: Thing, number: int, rng: np.random.Generator) -> None:
    reach = thing.radius * 1.1 + 1
    left, right = max(0, int(thing.x - reach)), min(SIDE, int(thing.x + reach) + 2)
    top, bottom = max(0, int(thing.y - reach)), min(SIDE, int(thing.y + reach) + 2)
    x = (np.arange(left, right, dtype=np.float32) + 0.5 - thing.x)[None, :]
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5 - thing.y)[:, None]
    cos, sin = np.cos(thing.turn), np.sin(thing.turn)
    across, down = cos * x + sin * y, cos * y - sin * x
    distance = SHAPES[thing.shape](across / thing.radius, down / thing.radius) * thing.radius
    opacity = np.clip(0.5 - distance, 0, 1)[..., None]
    color = _color(thing.color, rng)
    shade = np.where(_pattern(thing.texture, across, down, thing.radius), _DARKER, 1.0)[..., None]
    region = canvas[top:bottom, left:right]
    region += opacity * (color * shade - region)
    owner[top:bottom, left:right][distance < 0] = number
    if thing.letter is not None:
        _write(canvas, thing)


def _color(name: str, rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = _HUES[name]
    hue += rng.uniform(-0.015, 0.015)
    saturation *= rng.uniform(0.85, 1.0)
    value *= rng.uniform(0.9, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)), dtype=np.float32)


def _pattern(texture: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Where the darker shade is."""
    period = max(4.0, radius / 2.2)
    if texture == "striped":
        return np.mod(y + 0 * x, period) < period / 2
    if texture == "checked":
        return (np.mod(x, 2 * period) < period) ^ (np.mod(y, 2 * period) < period)
    if texture == "dotted":
        return np.hypot(np.mod(x, period) - period / 2, np.mod(y, period) - period / 2) < 0.3 * period
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)


def _write(canvas: np.ndarray, thing: Thing) -> None:
    """Black ink in the middle; the large things have letters of twice the size."""
    assert thing.letter is not None
    scale = 2 if thing.size == "large" else 1
    ink = bitmap(thing.letter, scale)
    top, left = round(thing.y - HEIGHT * scale / 2), round(thing.x - WIDTH * scale / 2)
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]][ink] = _INK
