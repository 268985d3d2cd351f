"""Keeps a pruner's folded weights in step with its parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from ocvtp.pruner.lane import recorded_by_others
from ocvtp_kernels.slot_attention import FoldedWeights, SlotStart

_CACHED_STARTS = 16  # (num_slots, seed) pairs whose first-iteration constants are kept


class FoldedState:
    """Folded weights of one state of the parameters, and first-iteration constants made from them.

    In up to two dtypes: that of PyTorch and of float32 kernels, and float16.
    """

    def __init__(self, fingerprint: tuple[object, ...], device: torch.device) -> None:
        self.fingerprint = fingerprint
        self._device = device
        self._weights: dict[torch.dtype, FoldedWeights] = {}
        self._starts: OrderedDict[tuple[torch.dtype, int, int], SlotStart] = OrderedDict()

    def known_weights(self, dtype: torch.dtype) -> FoldedWeights | None:
        """The folded weights, if they were made before."""
        return self._weights.get(dtype)

    def weights(self, dtype: torch.dtype, make: Callable[[], FoldedWeights]) -> FoldedWeights:
        """The folded weights, made on first use."""
        found = self.known_weights(dtype)
        if found is None:
            found = self._weights.setdefault(dtype, settled(make, self._device))
        return found

    def known_start(self, dtype: torch.dtype, num_slots: int, seed: int) -> SlotStart | None:
        """The constants of seeded noise, if they were made before."""
        return self._starts.get((dtype, num_slots, seed))

    def start(
        self, dtype: torch.dtype, num_slots: int, seed: int, make: Callable[[], SlotStart]
    ) -> SlotStart:
        """The constants of seeded noise, made on first use; the oldest go when there are many."""
        found = self.known_start(dtype, num_slots, seed)
        if found is None:
            found = self._starts[dtype, num_slots, seed] = settled(make, self._device)
            while len(self._starts) > _CACHED_STARTS:
                self._starts.popitem(last=False)
        return found


def fingerprint(parameters: Iterable[torch.Tensor]) -> tuple[object, ...]:
    """Changes with in-place writes that autograd counts, with swapped storage and replaced parameters.

    Fused optimizers, writes through ``.data`` and writes to inference tensors leave no trace in it.
    """
    return tuple(
        (
            id(parameter),
            -1 if parameter.is_inference() else parameter._version,
            parameter.untyped_storage()._cdata,
        )
        for parameter in parameters
    )


_Made = TypeVar("_Made", FoldedWeights, SlotStart)


def settled(make: Callable[[], _Made], device: torch.device) -> _Made:
    """``make()``, finished on its ``device``, so that any stream may read the result from now on.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would own what outlives it.
    """
    if recorded_by_others(device):
        raise RuntimeError(
            "call the pruner once with the same num_slots and seed before capturing it in a CUDA graph"
        )
    made = make()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made
