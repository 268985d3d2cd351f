"""What the last steps measured, kept on the device until somebody looks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.training.team import Team


@dataclass(frozen=True)
class StepFacts:
    """What the host knows of a step."""

    step: int  # counted from 1: steps done
    epoch: int
    learning_rate: float
    slots: int


class Recent:
    """Steps since the last look.

    Looking is the one moment at which the host waits for the device, and at which processes compare: a step
    costs neither.

    Args:
        team: whose means are taken.
        images: of one step, of all processes.
    """

    def __init__(self, team: Team, images: int) -> None:
        self._team, self._images = team, images
        self._facts: list[StepFacts] = []
        self._measured: list[torch.Tensor] = []
        self._error = ""
        self._start = time.perf_counter()

    def add(
        self, facts: StepFacts, loss: torch.Tensor, live: torch.Tensor, norm: torch.Tensor, error: str
    ) -> None:
        """One step: this process's mean loss and share of live slots, norm of everybody's gradient."""
        self._facts.append(facts)
        self._measured.append(torch.stack([loss.float(), live.float(), norm.float()]).detach())
        self._error = self._error or error

    def look(self) -> tuple[list[dict[str, Any]], str, bool]:
        """A row for every step, this process's first error, and whether any process had one."""
        team, facts = self._team, self._facts
        failed = torch.tensor([float(bool(self._error))])
        own = torch.cat([*self._measured, failed.to(self._measured[0])]) if facts else failed
        total = team.sum(own)
        rate = self._images * len(facts) / max(1e-9, time.perf_counter() - self._start)
        rows = [
            {
                "step": fact.step,
                "epoch": fact.epoch,
                "loss": _finite(loss),
                "gradient_norm": _finite(norm),
                "learning_rate": fact.learning_rate,
                "slots": fact.slots,
                "live_slots": _finite(live),
                "images_per_second": rate,
            }
            for fact, (loss, live, norm) in zip(
                facts, (total[:-1] / team.size).reshape(-1, 3).tolist(), strict=True
            )
        ]
        error = self._error
        self._facts, self._measured, self._error = [], [], ""
        self._start = time.perf_counter()
        return rows, error, bool(total[-1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
