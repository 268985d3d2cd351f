"""What is in a picture: things of one shape, colour, texture and size each, some with a letter on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.testbed.glyphs import LETTERS
from bench.testbed.shapes import ROOMY, SHAPES, TURNS

SIDE = 128
SHAPE_NAMES = tuple(SHAPES)
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
TEXTURES = ("plain", "striped", "dotted", "checked")
#: Radius in pixels, least and most, by the word for it; the gaps keep the words apart.
SIZES = {"tiny": (4.2, 5.4), "small": (7.4, 9.4), "large": (12.8, 17.0)}
#: Colour and shape that never meet in training and test scenes: one shape of every colour.
HELD_OUT = frozenset((color, SHAPE_NAMES[(3 * i + 2) % 8]) for i, color in enumerate(COLORS))
#: Least and most of a scene.
THINGS = (3, 8)
_CROWD = 20
_CROWD_LETTERS = 0.6
_LETTER_CHANCE = 0.75
_MOST_LETTERS = 3
_EDGE = 1.5  # pixels between things, and to the border
_TRIES = 60


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        shape: of :data:`SHAPE_NAMES`.
        color: of :data:`COLORS`.
        texture: of :data:`TEXTURES`.
        size: of :data:`SIZES`.
        x: of its middle, in pixels from the left.
        y: of its middle, in pixels from the top.
        radius: in pixels.
        turn: in radians.
        letter: on it, or none.
    """

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    turn: float
    letter: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    Attributes:
        things: none covers another.
        seed: of what is painted behind them.
    """

    things: tuple[Thing, ...]
    seed: int


def sample(
    rng: np.random.Generator,
    unseen: bool = False,
    crowded: bool = False,
    things: tuple[int, int] = THINGS,
) -> Scene:
    """Draw a scene.

    Args:
        rng: all chance comes from it.
        unseen: with things of :data:`HELD_OUT`, two or three; otherwise there is none of them.
        crowded: with as many things as find room, and letters on most that have room for one: much to learn
            from one picture.
        things: least and most, unless crowded.
    """
    if crowded:
        return _scene(rng, [_kind(rng, list(COLORS), list(SHAPE_NAMES), False) for _ in range(_CROWD)], True)
    count = int(rng.integers(things[0], things[1] + 1))
    # Few colours and shapes in one scene make for groups to count and for near misses.
    colors = _some(rng, COLORS, int(rng.integers(2, 7)))
    shapes = _some(rng, SHAPE_NAMES, int(rng.integers(2, 7)))
    wanted = int(rng.integers(2, 4)) if unseen else 0
    kinds = [_kind(rng, colors, shapes, held_out=i < wanted) for i in range(count)]
    return _scene(rng, kinds, False)


def _scene(rng: np.random.Generator, kinds: list[tuple[str, str, str]], crowded: bool) -> Scene:
    letters = _some(rng, LETTERS, len(LETTERS)) if crowded else _letters(rng)
    placed: list[Thing] = []
    # The largest first: they would find no room later.
    for color, shape, size in sorted(kinds, key=lambda kind: -SIZES[kind[2]][1]):
        thing = _place(rng, placed, color, shape, size)
        if thing is None:
            continue
        wanted = not crowded or rng.random() < _CROWD_LETTERS
        if letters and wanted and thing.size != "tiny" and thing.shape in ROOMY:
            thing = _with_letter(thing, letters.pop())
        placed.append(thing)
    order = rng.permutation(len(placed))
    return Scene(tuple(placed[i] for i in order), int(rng.integers(2**31)))


def _some(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    return [str(name) for name in rng.choice(names, count, replace=False)]


def _kind(
    rng: np.random.Generator, colors: list[str], shapes: list[str], held_out: bool
) -> tuple[str, str, str]:
    size = str(rng.choice(tuple(SIZES), p=(0.25, 0.4, 0.35)))
    if held_out:
        color, shape = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        return color, shape, size
    while True:
        color, shape = str(rng.choice(colors)), str(rng.choice(shapes))
        if (color, shape) not in HELD_OUT:
            return color, shape, size
        shapes = list(SHAPE_NAMES)  # all the few may be held out


def _letters(rng: np.random.Generator) -> list[str]:
    if rng.random() > _LETTER_CHANCE:
        return []
    return _some(rng, LETTERS, int(rng.integers(1, _MOST_LETTERS + 1)))


def _place(rng: np.random.Generator, placed: list[Thing], color: str, shape: str, size: str) -> Thing | None:
    radius = float(rng.uniform(*SIZES[size]))
    turn = float(rng.uniform(-1, 1)) * TURNS[shape]
    texture = "plain" if size == "tiny" else str(rng.choice(TEXTURES, p=(0.4, 0.2, 0.2, 0.2)))
    reach = radius + _EDGE
    for x, y in rng.uniform(reach, SIDE - reach, (_TRIES, 2)):
        if all(np.hypot(x - other.x, y - other.y) > reach + other.radius for other in placed):
            return Thing(shape, color, texture, size, float(x), float(y), radius, turn)
    return None


def _with_letter(thing: Thing, letter: str) -> Thing:
    """Upright and plain, so that the letter can be read."""
    return Thing(thing.shape, thing.color, "plain", thing.size, thing.x, thing.y, thing.radius, 0.0, letter)
