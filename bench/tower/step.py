"""One way to compute what a language model reads of an image, and how several are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.harness import Timing, summarise
from bench.micro.gates import GateError

Results = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Step:
    """One way to compute what a language model reads of an image.

    Attributes:
        part: ``"tower"``, or the name of a part of it that is run alone.
        what: it computes.
        flops: of its matrix products.
        run: the rows of all or of kept tokens, and scores if it makes any.
        check: of these results; raises :class:`~bench.micro.gates.GateError`.
    """

    part: str
    what: str
    flops: int
    run: Callable[[], Results]
    check: Callable[[Results], None]


class Bench(Protocol):
    """A tower with its input, and all the ways to compute what is wanted of it."""

    @property
    def batch(self) -> int:
        """Images."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and pixels."""

    def steps(self) -> list[Step]:
        """All steps, each leaving out something that the one before computes."""


def clock_of(device: torch.device) -> str:
    """What :func:`measure` reads. On a CPU other programs' time must not count."""
    return "wall" if device.type == "cuda" else "processor"


def measure(bench: Bench, device: torch.device, seconds: float, least: int = 3) -> list[dict[str, Any]]:
    """Gate the steps of each part, then time them in turns.

    Args:
        bench: what to measure.
        device: it is on.
        seconds: for each part, by :func:`clock_of` the device, but
        least: time each step at least this often.

    Raises:
        SystemExit: a step's results are not those of transformers.
    """
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        steps = bench.steps()
        for part in dict.fromkeys(step.part for step in steps):
            calls = {step.what: _gated(step, device) for step in steps if step.part == part}
            timings = _in_turns(calls, device, seconds, least)
            rows += [
                {
                    "part": part,
                    "what": step.what,
                    "B": bench.batch,
                    "dtype": str(bench.dtype).removeprefix("torch."),
                    "gflop": step.flops / 1e9,
                    "ms": timings[step.what].to_dict(),
                }
                for step in steps
                if step.part == part
            ]
    return rows


def _in_turns(
    calls: Mapping[str, Callable[[], None]], device: torch.device, seconds: float, least: int
) -> dict[str, Timing]:
    """As :func:`bench.harness.interleaved`, by the device's clock."""
    now = time.perf_counter if clock_of(device) == "wall" else time.process_time
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {what: [] for what in calls}
    end = now() + seconds
    while len(next(iter(samples.values()))) < least or now() < end:
        for what, call in calls.items():
            start = now()
            call()
            samples[what].append((now() - start) * 1e3)
    return {what: summarise(values) for what, values in samples.items()}


def _gated(step: Step, device: torch.device) -> Callable[[], None]:
    """The step, to be timed: its first call, which nobody times, is checked."""
    checked = False

    def call() -> None:
        nonlocal checked
        results = step.run()
        if not checked:
            try:
                step.check(results)
            except GateError as error:
                raise SystemExit(f"gate failed at {step.part}, {step.what}: {error}") from error
            checked = True
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
