"""Where a patched model spends its time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.encode.timing import Clock


@contextlib.contextmanager
def stage_times(model: Any) -> Iterator[dict[str, float]]:
    """Measure where the vision side of a patched model spends its time.

        with ocvtp.vlm.stage_times(model) as times:
            model.generate(**inputs)
        times["pruner"]                      # milliseconds, summed over the calls

    The stages are ``"vision tower"`` (up to the deepest consumed layer), ``"pruner"`` (fill scores and
    selection) and ``"projector"``: on the kept rows, or on all where they are merged or weighed, and then
    owners and means as well. The device is synchronised around each of them, so their sum is more than what
    they cost in an undisturbed run. Outside of this context manager nothing is measured and nothing is
    synchronised.

    Raises:
        PatchError: ``model`` is not patched.
    """
    controller = controller_of(model)
    outer, clock = controller.clock, Clock()
    controller.clock = clock
    try:
        yield clock.times
    finally:
        controller.clock = outer
