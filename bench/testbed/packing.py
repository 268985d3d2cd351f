"""Many questions about one picture in one sequence: its tokens, which dominate, are computed once.

A sequence is the beginning, the picture's tokens, and one segment for each question. A segment sees what
comes before the segments and itself, and its positions go on where the picture's end, so that every question
is computed as if it stood there alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.testbed.examples import Example
from bench.testbed.language import ANSWER
from bench.testbed.model import Size
from bench.testbed.scenes import COLORS, LETTERS, SHAPE_NAMES, SIDE, SIZES, TEXTURES, Thing

_EIGHTHS = tuple("12345678")
#: What is said of every patch in the tower's own training; each has a last class for "nothing there".
DENSE = {
    "color": COLORS,
    "shape": SHAPE_NAMES,
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "letter": LETTERS,
    "column": _EIGHTHS,
    "row": _EIGHTHS,
}
#: Share of a patch's pixels that must be a thing's for the patch to show it.
LEAST_SHARE = 1 / 16
_IGNORED = -100


@dataclass
class Batch:
    """Pictures with their questions, packed.

    Attributes:
        pixels: ``[B, 3, side, side]``, as the processor makes them.
        ids: ``[B, T]`` int64, the segments one after the other, padded at the end.
        segments: ``[B, T]`` int64, the number of a token's segment, or -1.
        positions: ``[B, T]`` int64 within the segment.
        targets: ``[B, T]`` int64: the next token where it is part of an answer, elsewhere -100.
        answers: ``[Q, 2]`` int64, for every question its row and the column whose output is the answer.
        kinds: of the questions, Q of them.
        labels: ``[B, N]`` int64 for every name of :data:`DENSE`.
        places: ``[B, N, 3]``: where in the picture the middle of a patch's thing is, from -2 to 2 across and
            down, and the logarithm of its radius.
        stretch: ``[B]``: how far apart positions of neighbouring picture tokens are.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    answers: torch.Tensor
    kinds: list[str]
    labels: dict[str, torch.Tensor]
    places: torch.Tensor
    stretch: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """A copy there."""
        moved: dict[str, Any] = {
            name: value.to(device) if torch.is_tensor(value) else value for name, value in vars(self).items()
        }
        moved["labels"] = {name: label.to(device) for name, label in self.labels.items()}
        return Batch(**moved)


def pack(
    examples: Sequence[Example], vocabulary: dict[str, int], size: Size, stretch: Sequence[float]
) -> Batch:
    """Make a batch.

    Args:
        examples: pictures with questions.
        vocabulary: number of every word.
        size: of the model.
        stretch: for every picture.
    """
    rows = [_Row() for _ in examples]
    answers, kinds = [], []
    for number, (row, one) in enumerate(zip(rows, examples, strict=True)):
        for question in one.questions:
            row.add(
                _encode(question.text + ANSWER, vocabulary), [vocabulary[question.answer], vocabulary["</s>"]]
            )
            answers.append((number, len(row.ids) - 2))
            kinds.append(question.kind)
    length = max(1, *(len(row.ids) for row in rows))
    dense = [_dense(one, size) for one in examples]
    return Batch(
        pixels=normalise([one.pixels for one in examples], size.side),
        ids=_padded([row.ids for row in rows], length, vocabulary["<pad>"]),
        segments=_padded([row.segments for row in rows], length, -1),
        positions=_padded([row.positions for row in rows], length, 0),
        targets=_padded([row.targets for row in rows], length, _IGNORED),
        answers=torch.tensor(answers, dtype=torch.int64).reshape(-1, 2),
        kinds=kinds,
        labels={name: torch.stack([labels[name] for labels, _ in dense]) for name in DENSE},
        places=torch.stack([places for _, places in dense]),
        stretch=torch.tensor(list(stretch), dtype=torch.float32),
    )


def normalise(pictures: Sequence[np.ndarray], side: int) -> torch.Tensor:
    """Pictures ``[H, W, 3]`` uint8 as the processor of :mod:`bench.testbed.language` makes them.

    Returns:
        ``[B, 3, side, side]`` float32.
    """
    if side != SIDE:
        larger = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in pictures]
        pictures = [np.asarray(one) for one in larger]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.25


def shown(one: Example, side: int, patch: int) -> np.ndarray:
    """``[N]``: the thing that has most of a patch's pixels, if at least a sixteenth of them; else -1."""
    nearest = (2 * np.arange(side) + 1) * SIDE // (2 * side)
    owner = one.owner[np.ix_(nearest, nearest)]
    grid = side // patch
    blocks = owner.reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    counts = np.stack([(blocks == i).sum(1) for i in range(len(one.scene.things))], axis=1)
    return np.where(counts.max(1) >= LEAST_SHARE * patch**2, counts.argmax(1), -1)


def _encode(text: str, vocabulary: dict[str, int]) -> list[int]:
    return [vocabulary[word] for word in text.replace("?", " ?").replace(":", " :").split()]


class _Row:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.segments: list[int] = []
        self.positions: list[int] = []
        self.targets: list[int] = []
        self._count = 0

    def add(self, question: list[int], answer: list[int]) -> None:
        """The last word of the answer is predicted and never read."""
        tokens = question + answer[:-1]
        self.ids += tokens
        self.segments += [self._count] * len(tokens)
        self.positions += range(len(tokens))
        self.targets += [_IGNORED] * (len(question) - 1) + answer
        self._count += 1


def _padded(rows: list[list[int]], length: int, filler: int) -> torch.Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows], dtype=torch.int64)


def _named(thing: Thing, name: str) -> str | None:
    """What :data:`DENSE` says of a thing: an attribute, or the eighth of the picture its middle is in."""
    if name in ("column", "row"):
        return _EIGHTHS[int(8 * (thing.x if name == "column" else thing.y) / SIDE)]
    value: str | None = getattr(thing, name)
    return value


def _across(pixel: float) -> float:
    return 4 * pixel / SIDE - 2


def _dense(one: Example, size: Size) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    seen = shown(one, size.side, size.patch)
    labels, things = {}, one.scene.things
    for name, values in DENSE.items():
        codes = [values.index(v) if (v := _named(thing, name)) else len(values) for thing in things]
        labels[name] = torch.from_numpy(np.array([*codes, len(values)])[seen])
    places = np.array([[_across(t.x), _across(t.y), np.log(t.radius)] for t in things] + [[0.0] * 3])[seen]
    return labels, torch.from_numpy(places).float()
