"""Batches by number: the same pictures for the same step, whenever and however often training is started."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bench.testbed.examples import Split, example
from bench.testbed.language import VOCABULARY
from bench.testbed.packing import Batch, pack
from bench.testbed.recipe import Recipe
from bench.testbed.scenes import THINGS

_LEAST_STRETCH = 0.05


class Batches(Dataset[Any]):
    """Packed batches of a split.

    Args:
        recipe: of the run.
        split: of the pictures.
        first: picture that the first batch begins with.
        batch: pictures from one batch to the next.
        count: batches.
        questions: asked about every picture.
        part: of every batch, as number and how many parts there are.
        stretched: share of pictures with stretched positions.
        crowded: whether pictures are full of things.
        things: least and most of a picture.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: Split,
        first: int,
        batch: int,
        count: int,
        questions: int,
        *,
        part: tuple[int, int] = (0, 1),
        stretched: float = 0.0,
        crowded: bool = False,
        things: tuple[int, int] = THINGS,
    ) -> None:
        self._recipe, self._split, self._first, self._batch, self._count = recipe, split, first, batch, count
        self._questions, self._stretched, self._crowded, self._things = questions, stretched, crowded, things
        share, left = divmod(batch, part[1])
        if left:
            raise ValueError(f"a batch of {batch} pictures can't be shared among {part[1]} processes")
        self._own = range(part[0] * share, (part[0] + 1) * share)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        pictures = [self._first + number * self._batch + i for i in self._own]
        examples = [example(self._split, i, self._questions, self._crowded, self._things) for i in pictures]
        stretch = [self._stretch(i) for i in pictures]
        return pack(examples, VOCABULARY, self._recipe.size, stretch)

    def _stretch(self, picture: int) -> float:
        rng = np.random.default_rng([self._recipe.seed, picture])
        if rng.random() >= self._stretched:
            return 1.0
        return float(np.exp(rng.uniform(np.log(_LEAST_STRETCH), 0)))
