"""What a vision tower can tell of its pictures, beside the rows it hands over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch


class OneHead(NamedTuple):
    """Attention of a block taken as a single head of full width.

    Attributes:
        row: ``[P, N]``, at least float32: what the class token gives to each patch. Without a class token,
            what each patch receives on average.
        keys: ``[P, N, C]``.
    """

    row: torch.Tensor
    keys: torch.Tensor


class Merged(NamedTuple):
    """Tokens that were merged on their way through the tower.

    Attributes:
        rows: ``[P, T, C]``, in the order of the first patch of each.
        owner: ``[P, N]`` int64, the row each patch went into.
        sizes: ``[P, T]`` float32, how many patches each is of.
    """

    rows: torch.Tensor
    owner: torch.Tensor
    sizes: torch.Tensor


class Evidence(Protocol):
    """A group of segments. Everything is computed when it is asked for, and for the rows it takes alone.

    P counts pictures: segments, or the tiles of each where a segment is several pictures. N counts the
    candidates of a picture.
    """

    @property
    def consumed(self) -> int:
        """The block whose output the projector reads in this call."""

    @property
    def tiles(self) -> int:
        """Pictures of a segment."""

    @property
    def grids(self) -> Sequence[tuple[int, int]]:
        """Per segment, rows and columns of its tiles, which follow one of the whole picture; or nothing."""

    @property
    def tokens(self) -> int:
        """N."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of a picture's candidates, if they are all of them in raster order."""

    @property
    def class_token(self) -> bool:
        """Whether :meth:`features` and :meth:`keys` begin with a class token."""

    def features(self) -> torch.Tensor:
        """``[P, N, C]``, or ``[P, 1 + N, C]`` with the class token: what the projector reads."""

    def salience(self) -> torch.Tensor:
        """``[P, N]``, at least float32: attention from the class token in the consumed block.

        Mean over heads. Without a class token, :meth:`received` there.
        """

    def received(self, block: int) -> torch.Tensor:
        """``[P, N]``, at least float32: attention received in a block, mean over heads and all queries.

        Args:
            block: :attr:`consumed`, or one of :attr:`~ocvtp.vlm.contracts.reducer.Reducer.blocks`.

        Raises:
            ValueError: one that this call doesn't run.
        """

    def keys(self) -> torch.Tensor:
        """``[P, N, d]``, or ``[P, 1 + N, d]``: keys of the consumed block, mean over heads."""

    def one_head(self) -> OneHead:
        """Of the block behind the consumed one, or of the consumed one where that is the last."""

    def projected(self) -> torch.Tensor:
        """``[P, N, D]``: what the language model reads of all candidates."""

    def merged(self, removed: Sequence[int]) -> Merged:
        """The tower run anew, merging tokens on the way.

        Args:
            removed: tokens to merge away in each block, up to the consumed one.
        """


@runtime_checkable
class Telling(Protocol):
    """A :class:`~ocvtp.vlm.contracts.adapter.Vision` that can give evidence."""

    def evidence(self, which: Sequence[int]) -> Evidence:
        """Of segments of one size."""
