"""Kept tokens that stand for the others: every token goes to its nearest kept token, rows become means."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_count, require_floating, require_int64, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._launch import why_no_kernel
from ocvtp_kernels.merge import op, reference

__all__ = ["Merged", "merge_by", "merge_tokens", "nearest_kept"]


class Merged(NamedTuple):
    """Kept tokens and what they stand for.

    Attributes:
        rows: ``[B, keep, C]``, mean over each kept token's tokens, in the dtype of ``x``.
        mass: ``[B, keep]`` float32, how many tokens these are; an image's masses sum to N.
        owner: ``[B, N]`` int64, position among the kept of the one that a token belongs to.
    """

    rows: torch.Tensor
    mass: torch.Tensor
    owner: torch.Tensor


def merge_tokens(
    x: torch.Tensor,
    indices: torch.Tensor,
    compare: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> Merged:
    """Average every token into its nearest kept one: :func:`nearest_kept`, then :func:`merge_by`.

    Mean and mass are what attention needs to treat a kept token like all that it stands for: proportional
    attention (Token Merging, arXiv 2210.09461) adds ``log(mass)`` to its logits.

    Args:
        x: ``[B, N, C]`` floating point, any strides: what is averaged.
        indices: ``[B, keep]`` int64, kept tokens, ascending and unique per row but for what ``mask`` says.
        compare: ``[B, N, C2]`` floating point, any strides: what tells who is near; ``None`` is ``x``.
        mask: ``[B, keep]`` bool, false where an index only repeats the last one, because the image keeps
            fewer (as ``ocvtp.selection.Selection.mask``): those own nothing, with mass 0 and rows 0.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take up to 32 bits.

    Returns:
        :class:`Merged`. ``rows`` are differentiable in ``x``; the assignment has no gradient.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    _check_tokens("x", x)
    if compare is None:
        compare = x
    _check_kept(compare, indices, mask)
    require_shape("compare", compare, (x.shape[0], x.shape[1], None), "[B, N, C2]")
    _require_same_device("compare", compare, x)
    keep = indices.shape[1]
    # Both before anything runs.
    if (_resolve(backend, compare), _resolve(backend, x)) == ("triton", "triton"):
        owner, _ = op.nearest_kept(compare, indices, mask, count=False)
        rows, mass = op.merge_by(x, owner, keep)  # counts on its way
        return Merged(rows, mass, owner)
    owner, mass = nearest_kept(compare, indices, mask, backend=backend)
    return Merged(merge_by(x, owner, keep, backend=backend), mass, owner)


def nearest_kept(
    compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None = None, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which kept token each token belongs to, and how many belong to each.

    That is the nearest by squared distance, ties to the lower position. A kept token belongs to itself, even
    if another is equal; one that is kept twice, to its first position, and the second owns nothing. Distances
    are compared after the image's mean is taken off, by products in float32 (float64 for float64): of two
    that differ by less than rounding, either may win. Where they overflow or are no number, which is a matter
    of one image alone, the first position wins.

    Args:
        compare: ``[B, N, C]`` floating point, any strides.
        indices: ``[B, keep]`` int64 in ``[0, N)``. Others are an error on a CPU; in the kernels they own
            nothing.
        mask: ``[B, keep]`` bool, false for those that own nothing; ``None`` for all true. An image with
            nothing but false gives all to position 0.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take up to 32 bits.

    Returns:
        ``owner`` ``[B, N]`` int64 in ``[0, keep)``, and ``mass`` ``[B, keep]`` float32, counts that sum to N.
        Neither has a gradient. An image's do not depend on the batch around it, nor, in PyTorch, on strides;
        compiled PyTorch promises neither.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    _check_kept(compare, indices, mask)
    if _resolve(backend, compare) == "triton":
        return op.nearest_kept(compare, indices, mask, count=True)
    keep = indices.shape[1]
    compare = compare.detach()  # torch.no_grad would leave tangents
    with torch.no_grad(), without_autocast(compare.device):
        owner = _owner(compare, indices, mask)
        return owner, reference.masses(owner, keep)


def merge_by(x: torch.Tensor, owner: torch.Tensor, keep: int, *, backend: str = "auto") -> torch.Tensor:
    """Mean of the tokens of each owner: ``out[b, t]`` is that of ``x[b, n]`` with ``owner[b, n] == t``.

    Args:
        x: ``[B, N, C]`` floating point, any strides.
        owner: ``[B, N]`` int64 in ``[0, keep)``, of :func:`nearest_kept` or any other. Others are an error on
            a CPU; the kernels leave such tokens out.
        keep: how many owners there are, at least 1.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take up to 32 bits.

    Returns:
        ``[B, keep, C]`` in the dtype of ``x``; sums are float32 (float64 for float64), in the order of the
        tokens: a row has the same bits on either backend, whatever the strides, the batch and the other rows,
        except from compiled PyTorch. Zero for an owner without tokens. What is no number stays in the row
        that it belongs to. Differentiable in ``x``, any number of times: a token's gradient is its owner's
        over their number.

    Raises:
        TypeError, ValueError: a wrong type, shape or number.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    _check_tokens("x", x)
    require_int64("owner", owner)
    require_shape("owner", owner, (x.shape[0], x.shape[1]), "[B, N]")
    _require_same_device("owner", owner, x)
    keep = require_count("keep", keep, x.shape[1], "the number of tokens")
    if _resolve(backend, x) == "triton":
        return op.merge_by(x, owner, keep)[0]
    with without_autocast(x.device):
        return reference.merge_by(x, owner, keep)


def _owner(compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if torch.compiler.is_compiling():  # one graph for any number of images
        return reference.nearest_kept(compare, indices, mask)

    def nearest(
        compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor]:
        return (reference.nearest_kept(compare, indices, mask),)

    return image_by_image(nearest, compare, indices, mask)[0]


def _check_tokens(name: str, x: torch.Tensor) -> None:
    require_floating(name, x)
    require_shape(name, x, (None, None, None), "[B, N, C]")
    if 0 in x.shape:
        raise ValueError(f"{name} must have an image, a token and a channel; got {list(x.shape)}")


def _check_kept(compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None) -> None:
    _check_tokens("compare", compare)
    require_int64("indices", indices)
    require_shape("indices", indices, (compare.shape[0], None), "[B, keep]")
    if not 1 <= indices.shape[1] <= compare.shape[1]:
        raise ValueError(
            f"between 1 and N tokens must be kept; got {list(indices.shape)} indices into tokens "
            f"{list(compare.shape)}"
        )
    _require_same_device("indices", indices, compare)
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {getattr(mask, 'dtype', type(mask).__name__)}")
    require_shape("mask", mask, (indices.shape[0], indices.shape[1]), "[B, keep]")
    _require_same_device("mask", mask, compare)


def _require_same_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, the tokens on {x.device}; move one with .to(device)")


def _resolve(backend: str, x: torch.Tensor) -> str:
    return resolve_backend(backend, "merge", x.device, lambda: why_no_kernel(x))
