"""A lane without a GPU: same control flow, everything at once, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ocvtp_kernels.slot_attention import TopTokens


class Rehearsal:
    """What :class:`ocvtp.pruner.lane.CudaLane` does, on the CPU; ``log`` tells in which order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.log: list[str] = []
        self.attempts = 0
        self.replays = True
        self.error: RuntimeError | None = None
        self.held: list[torch.Tensor] = []

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor]) -> Any:
        self.log.append("run")
        return work()

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        self.held = [*tensors]

    def record(self, work: Callable[[], TopTokens]) -> tuple[TopTokens, Callable[[], None]]:
        self.attempts += 1
        if self.error is not None:
            raise self.error
        self.log.append("record")
        places = work()
        for place in places:  # recording computes nothing: results are there after a replay only
            place.fill_(1 if place.dtype == torch.bool else -1)

        def replay() -> None:
            self.log.append("replay")
            if not self.replays:
                return
            for place, result in zip(places, work(), strict=True):
                place.copy_(result)

        return places, replay

    def mark(self) -> str:
        self.log.append("mark")
        return "mark"

    def join(self, mark: str, results: Sequence[torch.Tensor]) -> None:
        assert mark == "mark"
        assert all(isinstance(tensor, torch.Tensor) for tensor in results)
        self.log.append("join")

    def wait(self) -> None:
        self.log.append("wait")
