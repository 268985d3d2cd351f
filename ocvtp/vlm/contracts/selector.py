"""Who chooses the kept tokens, and of what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch

from ocvtp.selection import Selection

#: Asks for what was started beside the caller, for use on the current stream. Does not block.
Started = Callable[[], torch.Tensor]
#: :meth:`Selector.beside`.
Beside = Callable[[Callable[[], torch.Tensor], Sequence[torch.Tensor]], Started | None]
Rule = Literal["attention", "random", "grid", "farthest_point", "greedy_dpp"]
#: What chooses where nobody says who.
DEFAULT_RULE: Final = "greedy_dpp"


def reads_features(rule: str) -> bool:
    """Whether a rule compares the features of an encoder layer, so that its choice can be refined."""
    return rule in ("farthest_point", "greedy_dpp")


@dataclass(frozen=True)
class Group:
    """Segments of one call that are chosen from together.

    Attributes:
        which: numbers of the segments.
        tokens: candidates of each.
        shape: rows and columns, where they are a picture.
        keep: tokens to keep of each, or budgets to choose from (``keep="auto"``).
    """

    which: tuple[int, ...]
    tokens: int
    shape: tuple[int, int] | None
    keep: int | tuple[int, ...]


class Choice(Protocol):
    """Somebody who can select, once there are fill scores."""

    def select(self, fill_scores: torch.Tensor | None) -> Selection:
        """The kept tokens."""

    def select_rows(
        self, fill_scores: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[Selection, torch.Tensor]:
        """The kept tokens, and their rows of ``x`` ``[B, N, C]``."""


class Begun(Protocol):
    """A choice under way."""

    def get(self) -> Choice:
        """The choice, for use on the current stream."""


class Selector(Protocol):
    """Somebody who chooses among the tokens of an image. Holds no state of a call."""

    @property
    def name(self) -> str:
        """For the report."""

    @property
    def read_layer(self) -> int | None:
        """0-based index of the encoder layer whose output it reads; ``None`` if it reads none."""

    @property
    def reads_scores(self) -> bool:
        """Whether it wants to know how much attention tokens receive."""

    def begin(
        self,
        group: Group,
        features: torch.Tensor | None,
        device: torch.device,
        *,
        return_attention: bool = False,
    ) -> Begun:
        """Start choosing.

        Args:
            group: how many tokens, and how many to keep.
            features: ``[segments, N, C]`` of :attr:`read_layer`.
            device: where there are no features, the device for indices.
            return_attention: also return the slot attention map, if there is one.
        """

    def beside(self, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]) -> Started | None:
        """Start ``work`` beside the caller, if anything runs there; ``None`` if nothing was started.

        Args:
            work: needs no gradients.
            reads: tensors that it reads and that the caller may give up meanwhile.
        """

    def close(self) -> None:
        """Free what it holds on a device."""
