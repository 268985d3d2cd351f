"""Keeps a pruner's folded weights in step with its parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from ocvtp_kernels.slot_attention import FoldedWeights, SlotStart

_CACHED_STARTS = 16  # (num_slots, seed) pairs whose first-iteration constants are kept


class FoldedState:
    """Folded weights of one state of the parameters, and first-iteration constants made from them."""

    def __init__(self, fingerprint: tuple[object, ...], weights: FoldedWeights) -> None:
        self.fingerprint = fingerprint
        self.weights = weights
        self._starts: OrderedDict[tuple[int, int], SlotStart] = OrderedDict()

    def start(self, num_slots: int, seed: int, make: Callable[[], SlotStart]) -> SlotStart:
        """The constants of seeded noise, made on first use; the oldest go when there are many."""
        found = self._starts.get((num_slots, seed))
        if found is None:
            found = self._starts[num_slots, seed] = make()
            while len(self._starts) > _CACHED_STARTS:
                self._starts.popitem(last=False)
        return found


def fingerprint(parameters: Iterable[torch.Tensor]) -> tuple[object, ...]:
    """Changes whenever a value may have: in-place writes, swapped storage, replaced parameters."""
    return tuple(
        (
            id(parameter),
            -1 if parameter.is_inference() else parameter._version,
            parameter.untyped_storage()._cdata,
        )
        for parameter in parameters
    )
