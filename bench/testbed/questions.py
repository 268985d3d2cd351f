"""Questions about a scene, of eight kinds, every answer one word."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.testbed.scenes import COLORS, HELD_OUT, SHAPE_NAMES, SIDE, SIZES, TEXTURES, Scene, Thing

_ATTRIBUTES = ("size", "texture", "color", "shape")
_VALUES = {"size": tuple(SIZES), "texture": TEXTURES, "color": COLORS, "shape": SHAPE_NAMES}
_MOST_COUNTED = 6
_APART = 12.0  # pixels by which one thing must be beyond another
_MARGIN = 3.0  # pixels from the lines between the ninths of a picture
_LARGER = 1.35  # ratio of radii


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: of :data:`KINDS`.
        text: ends with a question mark.
        answer: one word.
        targets: numbers of the things it is about; none where the answer is that there are none.
    """

    kind: str
    text: str
    answer: str
    targets: tuple[int, ...] = ()


def ask(
    scene: Scene, rng: np.random.Generator, kind: str, focus: Sequence[int], unseen: bool = False
) -> Question | None:
    """A question of this kind, or ``None`` if the scene allows none.

    Args:
        scene: asked about.
        rng: all chance comes from it.
        kind: of :data:`KINDS`.
        focus: numbers of things of which the question is about one.
        unseen: where the answer is that there is none, what there is none of is a pair of
            :data:`HELD_OUT`; otherwise those are never spoken of.
    """
    question = _KINDS[kind](scene, rng, focus)
    if unseen and question is not None and not set(question.targets) & set(focus):
        return _no_such_pair(scene, rng, kind)
    return question


def _no_such_pair(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """Of a pair that never meets in training, nor in this scene."""
    pairs = [
        {"color": c, "shape": s}
        for c, s in sorted(HELD_OUT)
        if not _matching(scene, {"color": c, "shape": s})
    ]
    if kind not in ("existence", "count") or not pairs:
        return None
    values = pairs[int(rng.integers(len(pairs)))]
    if kind == "count":
        return Question(kind, f"how many {_words(values, plural=True)} are there?", "0")
    return Question(kind, f"is there a {_words(values)}?", "no")


def held_out(scene: Scene) -> list[int]:
    """Numbers of the things whose colour and shape never meet in training."""
    return [i for i, thing in enumerate(scene.things) if (thing.color, thing.shape) in HELD_OUT]


def _matching(scene: Scene, values: dict[str, str]) -> list[int]:
    return [
        i for i, thing in enumerate(scene.things) if all(getattr(thing, k) == v for k, v in values.items())
    ]


def _words(values: dict[str, str], plural: bool = False) -> str:
    noun = values.get("shape", "thing")
    if plural:
        noun += "es" if noun == "cross" else "s"
    return " ".join([*(values[k] for k in _ATTRIBUTES[:-1] if k in values), noun])


def _refer(scene: Scene, rng: np.random.Generator, number: int, hidden: Iterable[str] = ()) -> str | None:
    """Words that only this thing answers to, as few as will do, without the hidden attributes."""
    open_to_all = [name for name in _ATTRIBUTES if name not in set(hidden)]
    thing = scene.things[number]
    for count in range(1, len(open_to_all) + 1):
        subsets = list(itertools.combinations(open_to_all, count))
        for i in rng.permutation(len(subsets)):
            values = {name: getattr(thing, name) for name in subsets[i]}
            if _matching(scene, values) == [number]:
                return _words(values)
    return None


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _shuffled(rng: np.random.Generator, numbers: Sequence[int]) -> list[int]:
    return [numbers[i] for i in rng.permutation(len(numbers))]


def _color(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    templates = ("what color is the {}?", "what is the color of the {}?")
    return _attribute(scene, rng, focus, "color", templates)


def _shape(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    templates = ("what shape is the {}?", "what is the shape of the {}?")
    return _attribute(scene, rng, focus, "shape", templates)


def _attribute(
    scene: Scene, rng: np.random.Generator, focus: Sequence[int], name: str, templates: Sequence[str]
) -> Question | None:
    for number in _shuffled(rng, focus):
        if words := _refer(scene, rng, number, hidden=[name]):
            answer = getattr(scene.things[number], name)
            return Question(name, _pick(rng, templates).format(words), answer, (number,))
    return None


def _exists(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    """Of two attributes; where the answer is no, each is there, or one of them, but not together."""
    templates = ("is there a {}?", "can you see a {}?")
    other = _pick(rng, ("color", "color", "texture", "size"))
    thing = scene.things[focus[int(rng.integers(len(focus)))]]
    values = {other: getattr(thing, other), "shape": thing.shape}
    if rng.random() < 0.5:
        text = _pick(rng, templates).format(_words(values))
        return Question("existence", text, "yes", tuple(_matching(scene, values)))
    for _ in range(20):
        changed = dict(values)
        name = _pick(rng, (other, "shape"))
        changed[name] = _pick(
            rng, [getattr(each, name) for each in scene.things] + [_pick(rng, _VALUES[name])]
        )
        if not _matching(scene, changed) and _may_be_said(changed):
            return Question("existence", _pick(rng, templates).format(_words(changed)), "no")
    return None


def _may_be_said(values: dict[str, str]) -> bool:
    """Held-out pairs are never spoken of where they can't be: the answer would always be no."""
    return (values.get("color"), values.get("shape")) not in HELD_OUT


def _count(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    """Things of one attribute, of a colour and a shape, or all; every number is as likely as may be."""
    templates = ("how many {} are there?", "how many {} can you see?")
    groups: dict[int, list[dict[str, str]]] = {}
    predicates: list[dict[str, str]] = [{name: v} for name in _ATTRIBUTES for v in _VALUES[name]]
    predicates += [{"color": c, "shape": s} for c in COLORS for s in SHAPE_NAMES]
    predicates.append({})
    about_all = len(focus) == len(scene.things)
    for values in predicates:
        members = _matching(scene, values)
        wanted = about_all or bool(set(members) & set(focus))
        if wanted and len(members) <= _MOST_COUNTED and (members or _may_be_said(values)):
            groups.setdefault(len(members), []).append(values)
    if not groups:
        return None
    numbers = sorted(groups)
    chosen = groups[numbers[int(rng.integers(len(numbers)))]]
    values = chosen[int(rng.integers(len(chosen)))]
    members = _matching(scene, values)
    text = _pick(rng, templates).format(_words(values, plural=True))
    return Question("count", text, str(len(members)), tuple(members))


def _position(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    templates = ("where is the {}?", "in which part of the picture is the {}?")
    for number in _shuffled(rng, focus):
        thing = scene.things[number]
        lines = (SIDE / 3, 2 * SIDE / 3)
        if min(abs(c - line) for c in (thing.x, thing.y) for line in lines) < _MARGIN:
            continue
        if words := _refer(scene, rng, number):
            return Question("position", _pick(rng, templates).format(words), ninth(thing), (number,))
    return None


def ninth(thing: Thing) -> str:
    """The ninth of the picture that a thing's middle is in."""
    row = ("top", "", "bottom")[min(2, int(3 * thing.y / SIDE))]
    column = ("left", "", "right")[min(2, int(3 * thing.x / SIDE))]
    return "-".join(part for part in (row, column) if part) or "center"


_BEYOND: dict[str, Callable[[Thing, Thing], float]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


def _relation(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    for first, second in _pairs(scene, rng, focus):
        word = _pick(rng, tuple(_BEYOND))
        beyond = _BEYOND[word](scene.things[first], scene.things[second])
        one, other = _refer(scene, rng, first), _refer(scene, rng, second)
        if abs(beyond) >= _APART and one and other:
            return Question(
                "relation", f"is the {one} {word} the {other}?", _yes(beyond > 0), (first, second)
            )
    return None


def _size(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    for first, second in _pairs(scene, rng, focus):
        radii = scene.things[first].radius, scene.things[second].radius
        if max(radii) < _LARGER * min(radii):
            continue
        one, other = _refer(scene, rng, first, ["size"]), _refer(scene, rng, second, ["size"])
        if one and other:
            word = _pick(rng, ("larger", "smaller"))
            answer = _yes((radii[0] > radii[1]) == (word == "larger"))
            return Question("size", f"is the {one} {word} than the {other}?", answer, (first, second))
    return None


def _pairs(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in focus for b in range(len(scene.things)) if a != b]
    pairs += [(b, a) for a, b in pairs if b not in focus]
    return [pairs[i] for i in rng.permutation(len(pairs))[:12]]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _read(scene: Scene, rng: np.random.Generator, focus: Sequence[int]) -> Question | None:
    templates = ("what letter is on the {}?", "which letter is written on the {}?")
    lettered = [i for i, thing in enumerate(scene.things) if thing.letter]
    candidates = [number for number in focus if number in lettered]
    for number in _shuffled(rng, candidates):
        answer = scene.things[number].letter
        assert answer is not None
        if len(lettered) == 1 and rng.random() < 0.3:
            return Question("reading", "what letter is in the picture?", answer, (number,))
        if words := _refer(scene, rng, number):
            return Question("reading", _pick(rng, templates).format(words), answer, (number,))
    return None


_KINDS: dict[str, Callable[[Scene, np.random.Generator, Sequence[int]], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "existence": _exists,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "size": _size,
    "reading": _read,
}
KINDS = tuple(_KINDS)
