"""Microseconds of one step of a call."""

from __future__ import annotations

from dataclasses import replace

from bench.predict import model
from bench.predict.kernel import Counter, Counts
from bench.predict.model import Times
from bench.predict.steps import Operator, Step
from ocvtp_kernels._launch import Launch


def times(step: Step, images: int, counter: Counter) -> Times:
    """Of one step of a call."""
    if isinstance(step, Operator):
        return model.operator(step, images)
    assert isinstance(step, Launch)
    if not step.phases:
        return model.kernel(counter.of(step), images)
    phases: dict[str, Counts] = {}
    first = 0
    for number, phase in enumerate(step.phases, 1):
        phases[f"{number} {phase.name}"] = counter.of(step, range(first, first + phase.tasks))
        first += phase.tasks
    whole = counter.of(step, range(first))
    notes = tuple(note for note in whole.notes if "branches" not in note)  # waiting is no work
    return model.phased(replace(whole, notes=notes), phases, images)
