"""How well kept tokens stand for all of an image, and moving them so that they stand better."""

from __future__ import annotations

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import as_int, require_floating, require_int64, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._launch import why_no_kernel
from ocvtp_kernels.coverage import op, reference

__all__ = ["MAX_ROUNDS", "check_rounds", "coverage_error", "refine", "refine_measured"]

#: Rounds that :func:`refine` takes; few images change after fifteen.
MAX_ROUNDS = 100


def coverage_error(x: torch.Tensor, indices: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Squared distance of each token to its nearest kept one, as a share of the image's variance.

    ``sum_n min_t |x_n - x_t|^2 / sum_n |x_n - mean|^2``: 0 when all is kept, about 1 when the kept tokens say
    no more than the mean would. An image of equal tokens has no variance, and error 0.

    Args:
        x: ``[B, N, C]`` floating point, any strides.
        indices: ``[B, T]`` int64 in ``[0, N)``, kept tokens, unique per row. Others are an error on a CPU;
            the kernels give the image error NaN.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take up to 32 bits.

    Returns:
        ``[B]``, at least float32. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    return refine_measured(x, indices, 0, backend=backend)[1]


def refine(x: torch.Tensor, indices: torch.Tensor, rounds: int, *, backend: str = "auto") -> torch.Tensor:
    """Move kept tokens to where they cover more; an image's :func:`coverage_error` never rises.

    A round assigns every token to its nearest kept token (a kept token to itself) and proposes, for each of
    these clusters, the member nearest the cluster's mean. Within a cluster that lowers the sum of squared
    distances as far as any member can, since ``sum |x - m|^2`` is that of the mean plus the cluster's size
    times ``|m - mean|^2``; assigning anew lowers it further. An image moves only if its error, computed
    afterwards, has fallen, so the guarantee holds in floating point, too. Clusters don't overlap, so kept
    tokens stay distinct. One image's result does not depend on the batch around it in Triton.

    Args:
        x: ``[B, N, C]`` floating point, any strides.
        indices: ``[B, T]`` int64 in ``[0, N)``, unique per row. An image with others is an error on a CPU;
            the kernels leave it the indices that it has.
        rounds: how many, ``0 <= rounds <=`` :data:`MAX_ROUNDS`.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take up to 32 bits.

    Returns:
        ``[B, T]`` int64, ascending and unique per row.

    Raises:
        TypeError, ValueError: a wrong type, shape or number of rounds.
        BackendUnavailableError: an explicit backend that can't run.
    """
    return refine_measured(x, indices, rounds, backend=backend)[0]


def refine_measured(
    x: torch.Tensor, indices: torch.Tensor, rounds: int, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`refine`, whose arguments and errors these are, and the :func:`coverage_error` it ends at.

    The last round knows that error, so asking for both here costs nothing more.
    """
    _check(x, indices)
    rounds = check_rounds(rounds)
    x = x.detach()  # torch.no_grad would leave tangents
    if _resolve(backend, x) == "triton":
        kept, error = op.coverage(x, indices, rounds)
        return kept.sort(dim=1).values, error
    with torch.no_grad(), without_autocast(x.device):
        return reference.refine(x, indices, rounds)


def check_rounds(rounds: object) -> int:
    """A number of rounds; ``TypeError`` or ``ValueError`` for one that makes no sense."""
    count = as_int(rounds)
    if count is None:
        raise TypeError(f"refine must be an int, a number of rounds; got {type(rounds).__name__}")
    if not 0 <= count <= MAX_ROUNDS:
        raise ValueError(f"refine must be between 0 and {MAX_ROUNDS} rounds; got {count}")
    return count


def _check(x: torch.Tensor, indices: torch.Tensor) -> None:
    require_floating("x", x)
    require_shape("x", x, (None, None, None), "[B, N, C]")
    require_int64("indices", indices)
    require_shape("indices", indices, (x.shape[0], None), "[B, T]")
    if 0 in x.shape or not 1 <= indices.shape[1] <= x.shape[1]:
        raise ValueError(
            f"between 1 and N tokens must be kept; got {list(indices.shape)} indices into x {list(x.shape)}"
        )
    if indices.device != x.device:
        raise ValueError(f"x is on {x.device}, indices on {indices.device}; move one with .to(device)")


def _resolve(backend: str, x: torch.Tensor) -> str:
    return resolve_backend(backend, "coverage", x.device, lambda: why_no_kernel(x))
