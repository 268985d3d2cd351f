"""What questions give away: the likeliest answer to the words alone."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict

import numpy as np

from bench.accuracy.testset import TestSet
from bench.testbed.examples import questions_of
from bench.testbed.scenes import COLORS, SHAPE_NAMES, SIZES, TEXTURES

_PICTURES = 6000  # of the training split
_QUESTIONS = 12
_OFTEN = 8  # times that words must have been met before they count
_ATTRIBUTES = {*COLORS, *SIZES, *TEXTURES, *SHAPE_NAMES, *(f"{s}s" for s in SHAPE_NAMES), "crosses"}


def guessed(test: TestSet) -> np.ndarray:
    """``[Q]`` bool: whether the commonest answer to such a question in training is right.

    To the same words, if they were asked often enough; else to the same words but for attributes.
    """
    counts = _counts(_PICTURES)
    right = []
    for one in test.examples:
        for question in one.questions:
            exact = counts.get(question.text)
            often = exact is not None and exact.total() >= _OFTEN
            answers = exact if often and exact is not None else counts.get(_pattern(question.text))
            right.append(answers is not None and answers.most_common(1)[0][0] == question.answer)
    return np.array(right)


@functools.cache
def _counts(pictures: int) -> dict[str, Counter[str]]:
    """Answers of the training split, by the question and by its pattern."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in range(pictures):
        for question in questions_of("train", picture, _QUESTIONS):
            for key in (question.text, _pattern(question.text)):
                counts[key][question.answer] += 1
    return counts


def _pattern(text: str) -> str:
    """The question with its attributes left out."""
    return " ".join("*" if word.rstrip("?") in _ATTRIBUTES else word for word in text.split())
