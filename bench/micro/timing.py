"""How calls are timed: CUDA-graph replays by device events, eager calls by the host's clock."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from bench.micro.gates import Outputs
from ocvtp.pruner.lane import record_graph

Call = Callable[[], Outputs]
Mode = Literal["graph", "eager"]

#: Bytes read of all input sets together, over the size of the L2 cache, which doesn't strictly evict by age.
COVER = 3
_L2 = 50 * 1024**2  # where PyTorch doesn't tell
_ROUND = 2e-3  # seconds that a round lasts at least: graph launch and clock resolution vanish in it
_MOST_CALLS = 512


class Clock:
    """Shows the time that measured calls took and nothing else; pytest-benchmark's table is kept by it.

    Around a graph replay, a wall clock would show the time of many calls and of launching them.
    """

    __name__ = "measured"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds since it was made."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` go by."""
        self._now += seconds


class Round(Protocol):
    """A number of calls that are timed together."""

    calls: int

    def __call__(self) -> float:
        """Seconds of one call."""


class EagerRound:
    """Calls one after another from Python, launch cost included, ended by one synchronisation."""

    def __init__(self, calls: Sequence[Call], device: torch.device, seconds: float = _ROUND) -> None:
        self._device = device
        self._calls = itertools.cycle(calls)
        self.calls = 1
        self()
        self.calls = _enough(self(), seconds)

    def __call__(self) -> float:
        """Seconds of one call."""
        synchronise(self._device)
        start = time.perf_counter()
        for call in itertools.islice(self._calls, self.calls):
            call()
        synchronise(self._device)
        return (time.perf_counter() - start) / self.calls


class GraphRound:
    """Calls captured in one CUDA graph, whose replays are timed by device events.

    The calls must have run before: compiling and tuning can't be captured. Results of all calls are kept, so
    that each writes memory of its own.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, seconds: float = _ROUND) -> None:
        self._device = device
        eager = EagerRound(calls, device, 0.0)()
        repeats = math.ceil(_enough(eager, seconds) / len(calls))
        self._capture(calls, repeats)
        # Eager time is an upper bound, at B=1 mostly Python's: fill the round up.
        took = self() * self.calls
        more = min(math.ceil(seconds / max(took, 1e-9)), _MOST_CALLS // self.calls)
        if more > 1:
            del self._graph, self.outputs
            self._capture(calls, repeats * more)

    def _capture(self, calls: Sequence[Call], repeats: int) -> None:
        def work() -> list[Outputs]:
            return [call() for _ in range(repeats) for call in calls]

        self.outputs, self._graph = record_graph(work, torch.cuda.Stream(self._device))
        self.calls = len(self.outputs)
        self.replay()  # the first replay uploads the graph

    def replay(self) -> None:
        """Run the captured calls once, and wait."""
        self._graph.replay()
        torch.cuda.synchronize()

    def __call__(self) -> float:
        """Seconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.calls


def _enough(each: float, seconds: float) -> int:
    """Calls of ``each`` seconds that fill a round."""
    return max(1, min(math.ceil(seconds / max(each, 1e-9)), _MOST_CALLS))


def rounds_in(seconds: float, round_seconds: float, least: int = 5, most: int = 50) -> int:
    """How many rounds to time."""
    return max(least, min(int(seconds / max(round_seconds, 1e-9)), most))


def sets_needed(read: int, batch: int, l2: int) -> int:
    """Input sets to rotate over: one, warm, for a single image; else so many that the L2 can't hold them."""
    return 1 if batch == 1 or l2 == 0 else max(1, math.ceil(COVER * l2 / read))


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a GPU; 0 for a CPU, where inputs are not rotated."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _L2


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
