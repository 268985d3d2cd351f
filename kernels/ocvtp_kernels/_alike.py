"""Products and sums of PyTorch whose bits depend on the numbers alone.

BLAS, oneDNN and PyTorch's sums order their additions by the sizes and the layout of what they are given. The
same numbers, transposed in memory or with another image beside them, may come out with other last bits; on
which machine they do is chance. Wherever we promise bits, PyTorch gets one image at a time, laid out alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def laid_out(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x``, in ``dtype``, with its rows one after another in memory: itself if it is so, else one copy."""
    return x.to(x.dtype if dtype is None else dtype, memory_format=torch.contiguous_format).contiguous()


def image_by_image(
    function: Callable[..., tuple[torch.Tensor, ...]], *batched: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """``function`` of one image after another, put together: the batch changes no bit.

    Args:
        function: of ``[1, ...]`` tensors; makes ``[1, ...]`` tensors. That strides change no bit is its own
            business: see :func:`laid_out`.
        batched: its arguments: ``[B, ...]``, or ``[1, ...]`` where all images share one, or ``None``.

    Returns:
        What ``function`` makes, ``[B, ...]``.
    """
    images = max(len(x) for x in batched if x is not None)
    if images <= 1:
        return function(*batched)
    alone = [
        function(*(x if x is None or len(x) == 1 else x[image : image + 1] for x in batched))
        for image in range(images)
    ]
    return tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
