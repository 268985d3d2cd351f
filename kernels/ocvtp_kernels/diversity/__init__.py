"""Tokens unlike each other, chosen greedily: farthest points, and the largest volume."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_count, require_floating, require_int64, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._launch import why_no_kernel
from ocvtp_kernels.diversity import op, reference
from ocvtp_kernels.diversity.reference import in_range

__all__ = ["farthest_points", "in_range", "largest_volume"]

_Choose = Callable[[torch.Tensor, int], torch.Tensor]


def farthest_points(
    x: torch.Tensor,
    keep: int,
    *,
    start: torch.Tensor | None = None,
    ascending: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Greedily the token farthest from all kept ones; the first is the one nearest the image's mean.

    At most twice the least possible radius (T. F. Gonzalez, Theoretical Computer Science 38, 1985). Of equal
    distances the lowest index wins. One image's result does not depend on the batch around it in Triton.

    Args:
        x: ``[B, N, C]`` floating point, any strides; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.
        start: ``[B, keep]`` int64, tokens that are kept already, unique per row, and -1 behind them: the
            others are chosen after them. How many there are may differ from image to image. One that is no
            token, N or more, is an error on a CPU; the kernel chooses another for it.
        ascending: or else in the order of choice, of which the first k are what ``keep=k`` would choose. All
            N tokens are always ascending.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take up to 32 bits.

    Returns:
        ``[B, keep]`` int64, unique per row. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget.
        BackendUnavailableError: an explicit backend that can't run.
    """
    if start is not None:
        _check_start(x, keep, start)
    given = None if start is None else start.contiguous()

    def kernels(x: torch.Tensor, keep: int) -> torch.Tensor:
        return op.farthest_points(x, keep, given)

    def pytorch(x: torch.Tensor, keep: int) -> torch.Tensor:
        return reference.farthest_points(x, keep, given)

    return _choose("farthest_points", kernels, pytorch, x, keep, ascending, backend)


def largest_volume(
    x: torch.Tensor, keep: int, *, ascending: bool = True, backend: str = "auto"
) -> torch.Tensor:
    """Greedy MAP of a determinantal point process over cosine similarity: the largest volume, token by token.

    By the incremental Cholesky factor of Chen, Zhang and Zhou, "Fast Greedy MAP Inference for Determinantal
    Point Process" (arXiv 1709.05135). The kernel is the Gram matrix of normalised tokens, never stored whole.
    All tokens start alike, so the first kept is token 0. Beyond the tokens' rank, where volumes are 0, the
    lowest indices left.

    Arguments, result and errors are those of :func:`farthest_points`, but for ``start``.
    """
    return _choose("largest_volume", op.largest_volume, reference.largest_volume, x, keep, ascending, backend)


def _check_start(x: torch.Tensor, keep: int, start: torch.Tensor) -> None:
    require_int64("start", start)
    require_shape("start", start, (x.shape[0], keep), "[B, keep]")
    if start.device != x.device:
        raise ValueError(f"x is on {x.device}, start on {start.device}; move one with .to(device)")


def _choose(
    name: str, kernels: _Choose, pytorch: _Choose, x: torch.Tensor, keep: int, ascending: bool, backend: str
) -> torch.Tensor:
    require_floating("x", x)
    require_shape("x", x, (None, None, None), "[B, N, C]")
    if x.shape[2] == 0:
        raise ValueError(f"x has tokens without columns: {list(x.shape)}")
    keep = require_count("keep", keep, x.shape[1], "the number of tokens N")
    chosen_backend = resolve_backend(backend, name, x.device, lambda: why_no_kernel(x))
    if keep == x.shape[1] or len(x) == 0:
        return torch.arange(keep, device=x.device).repeat(len(x), 1)
    x = x.detach()  # torch.no_grad would leave tangents
    if chosen_backend == "triton":
        tokens = kernels(x, keep)
    else:
        with torch.no_grad(), without_autocast(x.device):
            tokens = pytorch(in_range(x), keep)
    return tokens.sort(dim=1).values if ascending else tokens
