"""The batches of a run: which images a step sees follows from the seed and the step, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ocvtp.training.recipe import Recipe
from ocvtp.training.source import FeatureSource
from ocvtp.training.step import Draw, draw, generator, slot_counts

#: Which part of so many images is this process's: first, and last excluded.
Part = Callable[[int], tuple[int, int]]


def everything(size: int) -> tuple[int, int]:
    """The part of a process that is alone."""
    return 0, size


class Batch(NamedTuple):
    """One process's part of a step's batch."""

    features: torch.Tensor  # [b, N, C] float16; zeros after an error
    noise: torch.Tensor  # [b, K, D]
    hidden: torch.Tensor  # [b, N]
    error: str = ""  # why the features could not be read

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All but the error on a device; the features in float32."""
        features, noise, hidden = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return features.float(), noise, hidden


class TrainingBatches(Dataset[Batch]):
    """Item ``i`` is the batch of step ``i``. Of every epoch, what fills no batch is left out.

    Args:
        source: of features.
        records: of it that are trained on.
        recipe: batch size and draws.
        slot_dim: width of the noise.
        part: of every batch, for this process.
    """

    def __init__(
        self,
        source: FeatureSource,
        records: Sequence[int],
        recipe: Recipe,
        slot_dim: int,
        part: Part = everything,
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
        records = [self._records[i] for i in self._epoch(epoch)[place * size : (place + 1) * size]]
        drawn = draw(self._recipe, size, self._source.tokens, self._slot_dim, "train", step)
        return _read(self._source, records, drawn, self._part)

    def _epoch(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            source = generator(self._recipe.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self._records), generator=source).tolist()
        return self._order[1]


class HeldOutBatches(Dataset[Batch]):
    """All of ``records``, masked alike every time; the parts of all processes make them up exactly once.

    Numbers of slots take turns, in batches small enough that each has its turn.
    """

    def __init__(
        self,
        source: FeatureSource,
        records: Sequence[int],
        recipe: Recipe,
        slot_dim: int,
        part: Part = everything,
    ) -> None:
        self._source, self._records, self._recipe = source, records, recipe
        self._slot_dim, self._part = slot_dim, part
        self._counts = slot_counts(recipe, source.tokens)
        self._size = max(1, min(recipe.batch_size, len(records) // len(self._counts)))

    def __len__(self) -> int:
        return -(-len(self._records) // self._size)

    def __getitem__(self, number: int) -> Batch:
        records = self._records[number * self._size : (number + 1) * self._size]
        drawn = draw(
            self._recipe,
            len(records),
            self._source.tokens,
            self._slot_dim,
            "validation",
            number,
            slots=self._counts[number % len(self._counts)],
        )
        return _read(self._source, records, drawn, self._part)


def load(batches: Dataset[Batch], numbers: range, workers: int, pinned: bool) -> Iterator[Batch]:
    """The batches of these numbers, in this order, read ahead by so many processes."""
    return iter(DataLoader(batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pinned))


def _read(source: FeatureSource, records: Sequence[int], drawn: Draw, part: Part) -> Batch:
    # An error is handed on, not raised: other processes must hear of it before this one leaves.
    first, last = part(len(records))
    nothing = torch.zeros(last - first, source.tokens, source.width, dtype=torch.float16)
    error = ""
    try:
        features = source.batch(records[first:last]) if first < last else nothing
        if not bool(features.isfinite().all()):
            error = f"features of records {list(records[first:last])} hold NaN or Inf; make them again"
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Batch(nothing if error else features, *drawn.part(first, last), error)
