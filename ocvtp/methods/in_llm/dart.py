"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): one cut, tokens unlike a few pivots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ocvtp.methods.in_llm.averages import fit_single
from ocvtp.methods.in_llm.contract import Choice, Numbering, Rows
from ocvtp.methods.in_llm.one_cut import OneCut
from ocvtp.methods.in_llm.ranking import check_keep, check_layer, highest, of_rows
from ocvtp_kernels._checks import as_int
from ocvtp_kernels._device import on_device


def longest(norms: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``[B, max(counts)]`` int64: the largest of each row ``[B, N]``, largest first, of equals the first.

    A row of a smaller count has the next largest behind its own, or padding.
    """
    return norms.sort(dim=1, descending=True, stable=True).indices[:, : max(counts)]


def least_alike(
    likeness: torch.Tensor, taken: torch.Tensor, allowed: torch.Tensor, each: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Walk the pivots, and let each take the tokens least like it that nobody took before.

    Args:
        likeness: ``[B, P, N]`` to each pivot, in the order walked.
        taken: ``[B, N]`` bool: from the start.
        allowed: ``[B, N]`` bool, false on padding.
        each: how many each pivot of a row takes, ``[B][P]``.

    Returns:
        ``[B, N]`` bool: all that are taken, of equals the first.
    """
    for pivot in range(likeness.shape[1]):
        free = likeness[:, pivot].neg().masked_fill(taken | ~allowed, float("-inf"))
        taken = taken | (highest(free, [row[pivot] for row in each]) & allowed)
    return taken


@dataclass(frozen=True)
class Dart(OneCut):
    """Before layer ``layer``, keep pivots and the vision tokens least like them.

    Pivots are the tokens of the longest keys (L1, in the layer before): some of the image, some of the text
    behind it. Each takes as many of the tokens least like it, by the cosine of states behind the last norm,
    as make up the budget: ``keep=4 + 8 * topk`` is the published ``topk``, and of others the first pivots
    take one more. A shorter text has fewer pivots, which take more. All vision tokens of a prompt are one
    pool.

    Attributes:
        layer: 0-based: layers before it see every token.
        keep: vision tokens from there on, or a share of them; with the image's pivots.
        pivots: of the image and of the text.
        walk: ``"rank"`` takes the image's pivots by length of their keys, then the text's. ``"set"`` walks
            them as CPython walks a set of their columns, as the published code does: that waits for the GPU.
    """

    layer: int = 2
    keep: int | float = 132
    pivots: tuple[int, int] = (4, 4)
    walk: Literal["rank", "set"] = "rank"

    name: ClassVar[str] = "DART"
    numbering: ClassVar[Numbering | None] = None
    published_numbering: ClassVar[Numbering] = "kept"
    adaptation: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", check_layer("layer", self.layer))
        object.__setattr__(self, "keep", check_keep("keep", self.keep))
        found = tuple(as_int(number) for number in self.pivots)
        if len(found) != 2 or any(number is None or number < 0 for number in found) or not found[0]:
            raise ValueError(
                f"pivots must be at least 1 of the image and some of the text; got {self.pivots!r}"
            )
        object.__setattr__(self, "pivots", found)
        if self.walk not in ("rank", "set"):
            raise ValueError(f'walk must be "rank" or "set"; got {self.walk!r}')

    @classmethod
    def fit(cls, average: int | float, *, depth: int, tokens: int | None = None, layer: int = 2) -> Dart:
        """See :meth:`FastV.fit <ocvtp.methods.in_llm.FastV.fit>`."""
        return cls(layer, fit_single(average, depth, tokens, layer))

    def choose(self, cut: int, rows: Rows) -> Choice:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        keep = [self.left(cut, present, present)[0] for present in rows.present]
        images = [min(self.pivots[0], kept) for kept in keep]
        words = [min(self.pivots[1], count) for count in rows.words]
        norms = rows.keys().float().abs().sum((1, 3))
        vision = norms.gather(1, rows.vision).masked_fill(~rows.is_vision, float("-inf"))
        text = norms.gather(1, rows.text).masked_fill(~rows.is_text, float("-inf"))
        walks = _side_by_side(
            rows.vision.gather(1, longest(vision, images)),
            images,
            rows.text.gather(1, longest(text, words)),
            words,
        )
        if self.walk == "set":
            walks = _as_sets(walks, rows.start, images, words)
        states = rows.normed()
        there, tokens = of_rows(states, walks), of_rows(states, rows.vision)
        likeness = _unit(there) @ _unit(tokens).transpose(1, 2)
        each = [_shares(kept - own, own + said) for kept, own, said in zip(keep, images, words, strict=True)]
        most = walks.shape[1]
        each = [[*row, *[0] * (most - len(row))] for row in each]
        kept = least_alike(likeness, highest(vision, images), rows.is_vision, each)
        return Choice(kept, evidence={"scores": vision, "pivots": walks})

    def check(self, heads: int) -> None:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""


def _unit(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)


def _shares(tokens: int, pivots: int) -> list[int]:
    """``tokens`` divided among ``pivots``; the first take one more where they don't divide."""
    if not pivots:
        return []
    each, more = divmod(tokens, pivots)
    return [each + (number < more) for number in range(pivots)]


def _side_by_side(
    image: torch.Tensor, images: Sequence[int], text: torch.Tensor, words: Sequence[int]
) -> torch.Tensor:
    """``[B, P]``: the image's pivots of each row, then its text's, then whatever for a row of fewer."""
    both = torch.cat([image, text], dim=1)
    first, most = image.shape[1], max(own + said for own, said in zip(images, words, strict=True))
    if min(images) == first and min(words) == text.shape[1]:
        return both
    order = [
        [*range(own), *range(first, first + said), *[0] * (most - own - said)]
        for own, said in zip(images, words, strict=True)
    ]
    return both.gather(1, on_device(torch.tensor(order), both.device))


def _as_sets(
    walks: torch.Tensor, start: torch.Tensor, images: Sequence[int], words: Sequence[int]
) -> torch.Tensor:
    """The same as CPython walks sets of these columns, counted from the first token of each row's prompt."""
    found = []
    for row, begin, own, said in zip(walks.tolist(), start.tolist(), images, words, strict=True):
        own_columns = [column - begin for column in row[: own + said]]
        found.append([*(column + begin for column in set(own_columns)), *row[own + said :]])
    return on_device(torch.tensor(found), walks.device)
