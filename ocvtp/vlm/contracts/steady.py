"""Vision sides that do the same again for other pixels, so that they can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar, runtime_checkable

import torch

from ocvtp.vlm.contracts.rows import KeptRows
from ocvtp.watch import Watch

Self = TypeVar("Self")


@runtime_checkable
class Steady(Protocol):
    """A :class:`~ocvtp.vlm.contracts.adapter.Vision` that has not run, and does the same for equal keys."""

    @property
    def pixels(self) -> torch.Tensor:
        """What the tower reads."""

    @property
    def key(self) -> Hashable:
        """All that a call says beside its pixels, as far as it changes what is launched or where rows go."""

    def on(self: Self, pixels: torch.Tensor) -> Self:
        """The same for other pixels of that shape, dtype and device."""


class Replays(Protocol):
    """Recorded vision sides of a model."""

    def rows(
        self, vision: object, prune: Callable[[object, Watch], KeptRows], watch: Watch
    ) -> KeptRows | None:
        """``prune(vision, watch)``, replayed; ``None`` where it has to be run.

        Args:
            vision: of a call; not run.
            prune: runs it.
            watch: told which images were not finite.

        Raises:
            ValueError: images of an earlier call were not finite.
        """

    def close(self) -> None:
        """Give graphs and their memory back; later calls are run."""
