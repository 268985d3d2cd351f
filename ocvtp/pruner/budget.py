"""A budget of tokens for each image: the smallest one that covers it well enough."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch

from ocvtp.selection import Selection
from ocvtp_kernels._checks import as_int, as_number
from ocvtp_kernels._device import on_device
from ocvtp_kernels._transforms import is_traced

__all__ = ["check_budgets", "share_of", "smallest_budget"]


def share_of(keep: float, tokens: int) -> int:
    """A share ``0 < keep <= 1.0`` of ``tokens``, at least one.

    Raises:
        ValueError: a number that is no share.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep as a share of the tokens must be in (0, 1]; got {keep}")
    return max(1, round(keep * tokens))


def check_budgets(
    keep: float | str, max_error: float | None, budgets: Sequence[int] | None
) -> tuple[float, list[int]] | None:
    """``max_error`` and ``budgets`` if ``keep`` asks for a budget of each image's own.

    Raises:
        TypeError, ValueError: arguments that don't go together, or make no sense.
    """
    if not isinstance(keep, str):
        if max_error is not None or budgets is not None:
            raise ValueError('max_error and budgets go with keep="auto"')
        return None
    if keep != "auto":
        raise ValueError(f'keep must be a number of tokens or "auto"; got {keep!r}')
    if max_error is None or budgets is None:
        raise ValueError(
            'keep="auto" needs max_error=, the largest coverage error, and budgets= to choose from'
        )
    error = as_number(max_error)
    if error is None:
        raise TypeError(f"max_error must be a number; got {type(max_error).__name__}")
    if not (math.isfinite(error) and error >= 0):
        raise ValueError(f"max_error must be at least 0; got {max_error}")
    counts: list[int] = []
    for budget in budgets:
        count = as_int(budget)
        if count is None or (counts and count <= counts[-1]):
            raise ValueError(f"budgets must be ascending ints; got {budgets!r}")
        counts.append(count)
    if not counts:
        raise ValueError(f"budgets must be ascending ints; got {budgets!r}")
    return error, counts


def smallest_budget(
    select: Callable[[int], Selection], max_error: float, budgets: Sequence[int]
) -> Selection:
    """Per image the selection of the smallest of ``budgets`` whose coverage error is at most ``max_error``.

    Args:
        select: makes a selection of so many tokens, with its coverage.
        max_error: largest coverage error.
        budgets: ascending.

    Returns:
        A selection of ``budgets[-1]`` columns whatever the images. Where fewer are kept, ``mask`` is false
        and the last kept index is repeated; where even the largest budget misses ``max_error``, it is taken
        and ``met`` is false, and on a CPU a warning says so.
    """
    found = [select(budget) for budget in budgets]
    largest = budgets[-1]
    errors = torch.stack([_coverage(selection) for selection in found])  # [budgets, B]
    enough = errors <= max_error
    met = enough.any(dim=0)
    which = torch.where(met, enough.to(torch.int8).argmax(dim=0), len(budgets) - 1)
    padded = torch.stack(
        [
            torch.cat([one.indices, one.indices[:, -1:].expand(-1, largest - one.indices.shape[1])], dim=1)
            for one in found
        ]
    )
    images = torch.arange(which.shape[0], device=which.device)
    count = on_device(torch.tensor(budgets), which.device)[which]
    looks = met.device.type == "cpu" and not torch.compiler.is_compiling() and not is_traced(met)
    if looks and not bool(met.all()):
        warnings.warn(
            f"{int((~met).sum())} of {len(met)} images miss max_error={max_error} even with "
            f"{largest} tokens, and keep that many",
            stacklevel=4,
        )
    return Selection(
        indices=padded[which, images],
        from_slots=torch.stack([one.from_slots for one in found])[which, images],
        coverage=errors[which, images],
        tokens=found[0].tokens,
        mask=torch.arange(largest, device=which.device) < count[:, None],
        count=count,
        met=met,
    )


def _coverage(selection: Selection) -> torch.Tensor:
    assert selection.coverage is not None
    return selection.coverage
