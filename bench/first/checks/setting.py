"""Sizes and clocks: those of a GPU, or of a rehearsal on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.micro.slot_inputs import Widths
from bench.micro.timing import EagerRound, GraphRound, rounds_in


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: that is measured.
        batch: images where there are many.
        tokens: of an image.
        slots: that look for them.
        widths: of the pruner.
        seconds: that one measurement takes, about.
    """

    device: torch.device
    batch: int = 64
    tokens: int = 576
    slots: int = 64
    widths: Widths = Widths()  # noqa: RUF009 - immutable
    seconds: float = 0.05

    @property
    def on_gpu(self) -> bool:
        """Whether kernels are compiled, and graphs replayed."""
        return self.device.type == "cuda"

    def graph_us(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Median microseconds of a call among ``calls``, replayed from one graph; on a CPU as they are."""
        return self._median(GraphRound if self.on_gpu else EagerRound, calls)

    def eager_us(self, call: Callable[[], Any]) -> float:
        """Median microseconds of a call from Python, with what the host takes."""
        return self._median(EagerRound, [call])

    def _median(self, kind: Any, calls: Sequence[Callable[[], Any]]) -> float:
        round_ = kind(calls, self.device, min(self.seconds, 2e-3))
        times = [round_()]
        for _ in range(rounds_in(self.seconds, times[0] * round_.calls) - 1):
            times.append(round_())
        return 1e6 * statistics.median(times)


def tiny(device: torch.device) -> Setting:
    """For a rehearsal."""
    return Setting(device, batch=2, tokens=40, slots=5, widths=Widths(24, 32, 16, 32), seconds=0.0)
