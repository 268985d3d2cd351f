"""Some pictures of a batch, by numbers that the host knows, without a wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def some_of(tensor: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
    """``tensor[list(which)]``, but for an index tensor, which a GPU would have to be waited for to copy.

    The tensor itself if they are all of it, a view where they follow one another.

    Args:
        tensor: ``[n, ...]``.
        which: in ``[0, n)``, in any order.
    """
    count = len(which)
    first = which[0] if count else 0
    if all(number == first + place for place, number in enumerate(which)):
        return tensor if count == len(tensor) else tensor[first : first + count]
    each = tensor.unbind(0)
    return torch.stack([each[number] for number in which])
