"""Pictures with questions by split and number: the same everywhere; no split shares a seed with another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.testbed.paint import paint
from bench.testbed.questions import KINDS, Question, ask, held_out
from bench.testbed.scenes import THINGS, Scene, sample

#: ``unseen`` asks about things whose colour and shape never meet in training, or says there is no such thing.
Split = Literal["train", "validation", "test", "unseen"]
_SPLITS: dict[str, int] = {"train": 1, "validation": 2, "test": 3, "unseen": 4}
_WORLD = 20261123  # all splits' seeds grow from it
_TRIES = 8  # kinds tried for every question asked for, before a scene is given up as too bare


@dataclass(frozen=True)
class Example:
    """A picture and what is asked about it.

    Attributes:
        scene: what is in it.
        pixels: ``[128, 128, 3]`` uint8.
        owner: ``[128, 128]`` int8, the thing at every pixel or -1.
        questions: about it.
    """

    scene: Scene
    pixels: np.ndarray
    owner: np.ndarray
    questions: tuple[Question, ...]


def example(
    split: Split,
    index: int,
    questions: int,
    crowded: bool = False,
    things: tuple[int, int] = THINGS,
) -> Example:
    """The picture ``index`` of a split.

    Args:
        split: of it.
        index: of it.
        questions: at most so many, all different.
        crowded: full of things, see :func:`bench.testbed.scenes.sample`.
        things: least and most.

    Raises:
        ValueError: no such split, or a negative index.
    """
    scene, asked = _compose(split, index, questions, crowded, things)
    pixels, owner = paint(scene)
    return Example(scene, pixels, owner, asked)


def questions_of(split: Split, index: int, questions: int) -> tuple[Question, ...]:
    """Those of :func:`example`, without painting."""
    return _compose(split, index, questions)[1]


def _compose(
    split: Split, index: int, questions: int, crowded: bool = False, things: tuple[int, int] = THINGS
) -> tuple[Scene, tuple[Question, ...]]:
    if split not in _SPLITS or index < 0:
        raise ValueError(f"no picture {index} in split {split!r}; splits: {', '.join(_SPLITS)}")
    rng = np.random.default_rng([_WORLD, _SPLITS[split], index])
    unseen = split == "unseen"
    scene = sample(rng, unseen, crowded, things)
    return scene, _ask_all(scene, rng, questions, unseen)


def _ask_all(scene: Scene, rng: np.random.Generator, questions: int, unseen: bool) -> tuple[Question, ...]:
    focus = held_out(scene) if unseen else list(range(len(scene.things)))
    found: dict[str, Question] = {}
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))]
    for turn in range(_TRIES * questions if focus else 0):
        question = ask(scene, rng, kinds[turn % len(kinds)], focus, unseen)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == questions:
            break
    return tuple(found.values())
