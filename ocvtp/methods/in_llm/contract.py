"""What a method that prunes inside a language model says of itself, asks for, and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

#: Numbering of what is left: as in the long prompt, or anew without gaps.
Numbering = Literal["kept", "renumbered"]


class Rows(Protocol):
    """The rows of a batch at one cut, as deep in the language model as that is.

    Rows hold different numbers of tokens: what is padded says where it is not padding. ``B`` rows of ``S``
    columns; at most ``V`` vision tokens and ``T`` tokens of text behind the last of them. Tensors are
    computed when they are asked for.
    """

    present: tuple[int, ...]
    """Vision tokens of each row that are left before this cut."""
    totals: tuple[int, ...]
    """Vision tokens of each row's prompt."""
    words: tuple[int, ...]
    """Tokens of text behind the last vision token, of each row."""
    vision: torch.Tensor
    """``[B, V]`` int64 columns of vision tokens, ascending: what stands on a placeholder, newlines too."""
    is_vision: torch.Tensor
    """``[B, V]`` bool, false on padding."""
    text: torch.Tensor
    """``[B, T]`` int64 columns of the text behind, ascending."""
    is_text: torch.Tensor
    """``[B, T]`` bool, false on padding."""
    last: torch.Tensor
    """``[B]`` int64 column of the prompt's last token."""
    start: torch.Tensor
    """``[B]`` int64 column of the prompt's first token."""
    memory: dict[str, torch.Tensor]
    """What the method keeps from one cut to the next."""

    @property
    def hidden(self) -> torch.Tensor:
        """``[B, S, D]`` as the layer before the cut left it."""

    @property
    def embeddings(self) -> torch.Tensor:
        """``[B, L, D]`` that the language model began with; ``S == L`` at the first cut."""

    @property
    def positions(self) -> torch.Tensor:
        """``[B, S]`` int64 in one dimension."""

    @property
    def frequencies(self) -> torch.Tensor:
        """``[d / 2]`` inverse frequencies of the rotary embedding of a head of width ``d``."""

    def normed(self) -> torch.Tensor:
        """``[B, S, D]``: :attr:`hidden` behind the language model's last norm."""

    def keys(self) -> torch.Tensor:
        """``[B, key heads, S, d]`` of the layer before the cut, rotated."""

    def attention(self, columns: torch.Tensor) -> torch.Tensor:
        """``[B, heads, R, S]`` float32: softmaxed attention of the layer before the cut, from the queries of
        ``columns`` ``[B, R]``."""

    def next_attention(self, columns: torch.Tensor) -> torch.Tensor:
        """The same of the layer behind the cut, on what it would get without one."""


@dataclass(frozen=True)
class Choice:
    """What a method decided at one cut.

    Attributes:
        kept: ``[B, V]`` bool, of the vision tokens that were there.
        merged: ``[B, C, D]`` tokens made of dropped ones, which follow the last vision token; ``None``: none.
        stands: ``[B, C]`` int64, of which of the ``V`` tokens each takes the place: a dropped one.
        made: how many of the ``C`` each row has.
        evidence: what it was decided by (``scores`` ``[B, V]``, for one), for tests and pictures.
    """

    kept: torch.Tensor
    merged: torch.Tensor | None = None
    stands: torch.Tensor | None = None
    made: tuple[int, ...] = ()
    evidence: dict[str, torch.Tensor] = field(default_factory=dict)


class Method(Protocol):
    """Settings of a method, frozen, and what it does at its cuts."""

    @property
    def name(self) -> str:
        """As its authors call it."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """0-based layers before which tokens are dropped, ascending."""

    @property
    def numbering(self) -> Numbering | None:
        """Of the positions behind a cut; ``None`` as published, where positions have one dimension."""

    @property
    def published_numbering(self) -> Numbering:
        """The authors'."""

    @property
    def adaptation(self) -> str | None:
        """What of it on models with positions in three dimensions is ours, in words; ``None``: nothing."""

    def left(self, cut: int, present: int, total: int) -> tuple[int, int]:
        """Vision tokens kept and made at cut number ``cut`` of ``present``, in a prompt of ``total``."""

    def choose(self, cut: int, rows: Rows) -> Choice:
        """The choice at cut number ``cut``. A row's does not depend on the rows beside it."""

    def check(self, heads: int) -> None:
        """Raise ``ValueError`` for a language model with so many attention heads that it can't work on."""
