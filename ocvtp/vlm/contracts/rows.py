"""What is chosen among, and what is handed over: images and videos of any size, several in a call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ocvtp_kernels._device import on_device


@dataclass(frozen=True)
class Segment:
    """Tokens among which one choice is made, with a budget of its own: an image, or a frame of a video.

    Attributes:
        item: which image or video of the call it belongs to. An item's segments follow one another.
        tokens: candidates.
        shape: rows and columns of the candidates where they are a picture in raster order, else ``None``.
    """

    item: int
    tokens: int
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)  # tensors have no truth
class Piece:
    """Rows for the language model of one or more segments that keep as many each.

    Attributes:
        rows: ``[segments, k, D]`` in prompt order.
        slots: ``[segments, k]`` int64: which of its item's placeholders each row belongs to, ascending.
        deep: DeepStack features of the same tokens, one ``[segments, k, D]`` per layer that adds some.
        mass: ``[segments, k]`` float32, how many candidates each row stands for; ``None``: one each.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()
    mass: torch.Tensor | None = None


class Projected(NamedTuple):
    """What the language model reads of candidates.

    Attributes:
        rows: ``[segments, n, D]``.
        deep: DeepStack features, one ``[segments, n, D]`` per layer that adds some.
    """

    rows: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows of all images (or all videos) of a call, in prompt order.

    Attributes:
        rows: one ``[k, D]`` per item.
        slots: ``[all k]`` int64: which of its item's placeholders each row belongs to.
        totals: placeholders per item in the unpruned prompt.
        deep: per layer that adds DeepStack features, one ``[k, D]`` per item.
        mass: ``[all k]`` float32, how many candidates each row stands for; ``None``: one each.
    """

    rows: tuple[torch.Tensor, ...]
    slots: torch.Tensor
    totals: tuple[int, ...]
    deep: tuple[tuple[torch.Tensor, ...], ...] = ()
    mass: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing was dropped."""
        return all(len(rows) == total for rows, total in zip(self.rows, self.totals, strict=True))

    def flat(self) -> torch.Tensor:
        """All rows, ``[all k, D]``."""
        return self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that gradients go through."""
        yield from self.rows
        for layer in self.deep:
            yield from layer

    def made_of(self, tensors: Iterator[torch.Tensor]) -> KeptRows:
        """The same with others in the place of :meth:`tensors`, taken from an iterator."""
        rows = tuple(next(tensors) for _ in self.rows)
        return replace(self, rows=rows, deep=tuple(tuple(next(tensors) for _ in one) for one in self.deep))

    def places(self, device: torch.device) -> torch.Tensor:
        """Which of all placeholders of the call each row belongs to, ``[all k]`` int64."""
        starts = list(itertools.accumulate(self.totals, initial=0))[:-1]
        kept = [len(rows) for rows in self.rows]
        offsets = torch.repeat_interleave(torch.tensor(starts), torch.tensor(kept), output_size=sum(kept))
        return self.slots.to(device) + on_device(offsets, device)


def assemble(
    segments: Sequence[Segment], totals: Sequence[int], made: Sequence[tuple[Sequence[int], Piece]]
) -> KeptRows:
    """Put pieces together.

    Args:
        segments: of the call.
        totals: placeholders per item.
        made: pieces and the segments they are of. Every segment is in exactly one.
    """
    where = {segment: (piece, i) for which, piece in made for i, segment in enumerate(which)}
    rows: list[list[torch.Tensor]] = [[] for _ in totals]
    levels = len(made[0][1].deep) if made else 0
    deep: list[list[list[torch.Tensor]]] = [[[] for _ in totals] for _ in range(levels)]
    for number, segment in enumerate(segments):
        piece, i = where[number]
        rows[segment.item].append(piece.rows[i])
        for level in range(levels):
            deep[level][segment.item].append(piece.deep[level][i])
    weighed = any(piece.mass is not None for _, piece in made)
    numbers = range(len(segments))
    mass = [part for number in numbers for part in _in_order(where, number, _mass)] if weighed else None
    return KeptRows(
        tuple(_joined(parts) for parts in rows),
        _joined([part for number in numbers for part in _in_order(where, number, _slots)]),
        tuple(totals),
        tuple(tuple(_joined(parts) for parts in layer) for layer in deep),
        None if mass is None else _joined(mass),
    )


def _in_order(
    where: dict[int, tuple[Piece, int]], number: int, of: Callable[[Piece], torch.Tensor]
) -> list[torch.Tensor]:
    """A segment's row of ``of(piece)``; all rows at once where a piece holds segments one after another."""
    piece, i = where[number]
    whole = all(where.get(number - i + j) == (piece, j) for j in range(len(piece.slots)))
    if not whole:
        return [of(piece)[i]]
    return [of(piece).flatten()] if i == 0 else []


def _slots(piece: Piece) -> torch.Tensor:
    return piece.slots


def _mass(piece: Piece) -> torch.Tensor:
    if piece.mass is not None:
        return piece.mass
    return torch.ones(piece.slots.shape, dtype=torch.float32, device=piece.rows.device)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
