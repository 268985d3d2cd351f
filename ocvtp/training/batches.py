"""The batches of a run: which images a step sees follows from the seed and the step, on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ocvtp.training.recipe import Recipe
from ocvtp.training.source import FeatureSource
from ocvtp.training.step import draw, generator


class Batch(NamedTuple):
    """One process's part of a step's batch, on the CPU."""

    features: torch.Tensor  # [b, N, C] float16
    noise: torch.Tensor  # [b, K, D]
    hidden: torch.Tensor  # [b, N]

    def to(self, device: torch.device) -> Batch:
        """On a device; the features in float32."""
        features = self.features.to(device, non_blocking=True).float()
        return Batch(
            features, self.noise.to(device, non_blocking=True), self.hidden.to(device, non_blocking=True)
        )


class Part(NamedTuple):
    """Which of several processes this is."""

    rank: int = 0
    processes: int = 1

    def of(self, size: int) -> tuple[int, int]:
        """Its share of ``size`` things in a row, the last one excluded."""
        return size * self.rank // self.processes, size * (self.rank + 1) // self.processes


class TrainingSteps(Dataset[Batch]):
    """Item ``i`` is the batch of step ``i``. Of every epoch, what fills no batch is left out.

    Args:
        source: of features.
        records: of it that are trained on.
        recipe: batch size and draws.
        slot_dim: width of the noise.
        part: of every batch, for this process.
    """

    def __init__(
        self, source: FeatureSource, records: Sequence[int], recipe: Recipe, slot_dim: int, part: Part
    ) -> None:
        self._source, self._records, self._recipe = source, records, recipe
        self._slot_dim, self._part = slot_dim, part
        self.per_epoch = len(records) // recipe.batch_size
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.per_epoch * self._recipe.epochs

    def __getitem__(self, step: int) -> Batch:
        size = self._recipe.batch_size
        epoch, place = divmod(step, self.per_epoch)
        order = self._epoch(epoch)[place * size : (place + 1) * size]
        first, last = self._part.of(size)
        drawn = draw(self._recipe, size, self._source.tokens, self._slot_dim, "train", step)
        features = self._source.batch([self._records[i] for i in order[first:last]])
        return Batch(features, *drawn.part(first, last))

    def _epoch(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            source = generator(self._recipe.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self._records), generator=source).tolist()
        return self._order[1]

    def loader(self, first: int, workers: int, pinned: bool) -> Iterator[Batch]:
        """Batches from step ``first`` on."""
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(first, len(self)),
                num_workers=workers,
                pin_memory=pinned,
            )
        )


def validation_batches(
    source: FeatureSource, records: Sequence[int], recipe: Recipe, slot_dim: int, part: Part
) -> Iterator[Batch]:
    """All of ``records``, masked alike every time; parts of processes add up to them exactly once."""
    for number, first in enumerate(range(0, len(records), recipe.batch_size)):
        batch = records[first : first + recipe.batch_size]
        drawn = draw(recipe, len(batch), source.tokens, slot_dim, "validation", number)
        begin, end = part.of(len(batch))
        if begin < end:
            yield Batch(source.batch(batch[begin:end]), *drawn.part(begin, end))
