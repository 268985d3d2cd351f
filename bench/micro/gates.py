"""What must hold before a figure is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

Outputs = tuple[torch.Tensor, ...]


class GateError(AssertionError):
    """An implementation computes something else than it should; it gets no figure."""


def require_equal(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit, but for the sign of zero.

    Raises:
        GateError: they differ; says where.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise GateError(f"{what}: {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}")
    different = got != want  # NaN, which poisoned memory holds, differs from everything
    if different.any():
        first = different.nonzero()[0].tolist()
        raise GateError(f"{what}: {int(different.sum())} of {got.numel()} differ, first at {first}")


def worst_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest relative error of an image, ``|got - want| / |want|`` over ``[B, N]``; NaN if any is NaN."""
    if got.shape != want.shape:
        raise GateError(f"shape {list(got.shape)} instead of {list(want.shape)}")
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


def require_error(what: str, error: float, bound: float) -> None:
    """At most ``bound``, and a number.

    Raises:
        GateError: it is more, or NaN.
    """
    if not error <= bound:
        raise GateError(f"{what}: relative error {error:.2e}, more than {bound:.2e}")


def poison(outputs: Sequence[Outputs]) -> None:
    """Overwrite results with what no correct call leaves; of flags, all are true after one."""
    for output in outputs:
        for tensor in output:
            if tensor.dtype == torch.bool:
                tensor.fill_(False)
            else:
                tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have ``torch.empty`` hand out NaN and huge integers, so that reading what nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a property of a module, which mypy can't see
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled
