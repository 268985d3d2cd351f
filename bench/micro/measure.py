"""One row: inputs, gate, timing, record."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import torch

from bench.harness import summarise
from bench.micro.case import Candidate, Case, Function, Gate
from bench.micro.ceilings import floor
from bench.micro.gates import Outputs, poison, poisoned_memory
from bench.micro.record import Recorder, Row
from bench.micro.timing import (
    Call,
    Clock,
    EagerRound,
    GraphRound,
    Mode,
    Round,
    l2_bytes,
    rounds_in,
    sets_needed,
)

Measure = Callable[[Case[Any, Any], Candidate, Mode], Row]

CLOCK = Clock()


class Benchmark(Protocol):
    """What is used of pytest-benchmark's fixture."""

    group: str | None
    enabled: bool

    def pedantic(self, target: Callable[[], None], *, rounds: int) -> object:
        """Run ``target`` that often."""


@dataclass
class Prepared:
    """Inputs of a case, what the gate expects of each, and functions made so far."""

    inputs: Sequence[Any]
    expected: Sequence[Any]
    functions: dict[str, Function] = field(default_factory=dict)
    first_call: dict[str, float] = field(default_factory=dict)


@functools.lru_cache(maxsize=1)
def prepared(case: Case[Any, Any], device: torch.device) -> Prepared:
    """The same inputs for all candidates, which come one after another."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    sets = sets_needed(case.work("ours").read, case.batch, l2_bytes(device))
    inputs = [case.draw(seed, device) for seed in range(sets)]
    return Prepared(inputs, [case.expect(each) for each in inputs])


def late_after(deadline: float | None, passed: float) -> None:
    """Skip a row that would start too late."""
    if deadline is not None and passed > deadline:
        pytest.skip(f"no row is started after {deadline:.0f} s")


@torch.no_grad()
def measure(
    case: Case[Any, Any],
    candidate: Candidate,
    mode: Mode,
    *,
    benchmark: Benchmark,
    recorder: Recorder,
    device: torch.device,
    seconds: float,
) -> Row:
    """Gate ``candidate`` on every input set, time it, record the row and return it.

    Args:
        case, candidate, mode: what to measure, and how.
        benchmark: runs the rounds and prints them.
        recorder: takes the row.
        device: to run on.
        seconds: about how long to time.

    Raises:
        GateError: it computes something else; nothing is recorded.
    """
    reason = candidate.why_not(case, device)
    if reason is not None:
        pytest.skip(reason)
    row: Row = {
        "op": case.op,
        "case": case.name,
        "shape": case.shape(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "implementation": candidate.name,
        "mode": mode,
    }
    recorder.drop(case.family, row)
    material = prepared(case, device)
    function = _function(case, candidate, material)
    calls = [functools.partial(function, inputs) for inputs in material.inputs]
    with poisoned_memory() if candidate.ours else contextlib.nullcontext():
        gate = [_check(case, candidate, call(), index, material) for index, call in enumerate(calls)]
    timed = _round(calls, candidate, mode, device)
    if isinstance(timed, GraphRound):  # what is timed is what was checked
        poison(timed.outputs)
        timed.replay()
        for index, outputs in enumerate(timed.outputs):
            _check(case, candidate, outputs, index % len(calls), material)
    samples = _time(timed, benchmark, f"{case.op} {case.label}", seconds)
    row |= {
        "note": candidate.note,
        "inputs": _said(case, len(calls), device),
        "gate": _worst(gate),
        **({"first_call_s": material.first_call[candidate.name]} if candidate.compiled else {}),
        **_figures(case, candidate, samples, timed.calls, recorder),
    }
    if benchmark.enabled:
        recorder.add(case.family, row)
    return row


def _function(case: Case[Any, Any], candidate: Candidate, material: Prepared) -> Function:
    """Made once for both modes; what doesn't compile is skipped."""
    if candidate.name not in material.functions:
        function = candidate.make(case)
        if candidate.compiled:
            start = time.perf_counter()
            try:
                function(material.inputs[0])
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                pytest.skip(f"torch.compile failed: {type(error).__name__}: {first[:200]}")
            material.first_call[candidate.name] = time.perf_counter() - start
        material.functions[candidate.name] = function
    return material.functions[candidate.name]


def _check(
    case: Case[Any, Any], candidate: Candidate, outputs: Outputs, index: int, material: Prepared
) -> Gate:
    return case.check(candidate.name, outputs, material.expected[index])


def _round(calls: Sequence[Call], candidate: Candidate, mode: Mode, device: torch.device) -> Round:
    if mode == "eager":
        return EagerRound(calls, device)
    try:
        return GraphRound(calls, device)
    except RuntimeError as error:
        if candidate.ours:
            raise
        pytest.skip(f"can't be captured in a CUDA graph: {str(error).splitlines()[0][:200]}")


def _time(timed: Round, benchmark: Benchmark, group: str, seconds: float) -> list[float]:
    samples: list[float] = []

    def target() -> None:
        samples.append(timed())
        CLOCK.advance(samples[-1])

    benchmark.group = group
    benchmark.pedantic(target, rounds=rounds_in(seconds, timed() * timed.calls))
    return samples


def _said(case: Case[Any, Any], sets: int, device: torch.device) -> str:
    if device.type == "cpu" or case.batch == 1:
        return "warm: one set"
    return f"rotating over {sets} sets, {sets * case.work('ours').read / 1e6:.0f} MB read"


def _worst(gates: Sequence[Gate]) -> Gate:
    """Of several input sets, the one with the largest error."""
    worst = max(gates, key=lambda gate: float(str(gate.get("error", 0))))
    return {**worst, "input_sets": len(gates)}


def _figures(
    case: Case[Any, Any], candidate: Candidate, samples: list[float], calls: int, recorder: Recorder
) -> Row:
    timing = summarise([1e6 * sample for sample in samples])
    work = case.work(candidate.name)
    figures: Row = {
        "median_us": timing.median,
        "p20_us": timing.p20,
        "p80_us": timing.p80,
        "rounds": timing.calls,
        "calls_per_round": calls,
        "least_work": work.to_dict(),
        "gigabytes_per_s": work.bytes / timing.median / 1e3,
        "teraflops_per_s": work.flops / timing.median / 1e6,
    }
    if recorder.ceilings is not None:
        least = floor(work, recorder.ceilings)
        figures |= {
            "floor_us": least.us,
            "floor_set_by": least.limit,
            "percent_of_floor": 100 * least.us / timing.median,
        }
    return figures
