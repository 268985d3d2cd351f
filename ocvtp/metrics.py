"""How much of an image its kept tokens hold: three measures that need no language model."""

from __future__ import annotations

import torch

from ocvtp.pruner import OCPruner
from ocvtp.selection import Selection
from ocvtp_kernels._checks import require_floating, require_shape
from ocvtp_kernels.coverage import coverage_error
from ocvtp_kernels.reconstruction import area_weighted_mse

__all__ = ["coverage", "least_squares_residual", "reconstruction_error"]


def coverage(x: torch.Tensor, kept: Selection | torch.Tensor) -> torch.Tensor:
    """Squared distance of tokens to their nearest kept one, relative to the image's variance.

    Args:
        x: ``[B, N, C]`` features, of any layer: those that the pruner read, or those that the model consumes.
        kept: a selection, or its ``[B, T]`` indices.

    Returns:
        ``[B]``, see :func:`ocvtp_kernels.coverage.coverage_error`.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    return coverage_error(x, _indices(x, kept))


@torch.no_grad()
def least_squares_residual(x: torch.Tensor, kept: Selection | torch.Tensor) -> torch.Tensor:
    """What no linear combination of the kept tokens can make, relative to the image's variance.

    ``sum_n |x_n - P x_n|^2 / sum_n |x_n - mean|^2``, P the projection on the span of the kept tokens (as they
    are, without the mean taken off). Computed in float64 from an orthonormal basis.

    Args:
        x: ``[B, N, C]`` floating point.
        kept: a selection, or its ``[B, T]`` indices.

    Returns:
        ``[B]`` float64; 0 where all tokens of an image are equal.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    indices = _indices(x, kept)
    wide = x.double()
    rows = wide.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))
    # Singular vectors, so that kept tokens that depend on each other do no harm.
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    limit = values[:, :1] * max(rows.shape[1:]) * torch.finfo(torch.float64).eps
    basis = basis * (values > limit)[:, :, None]
    left = wide - wide @ basis.transpose(1, 2) @ basis
    return _relative(left.square().sum(dim=(1, 2)), wide)


@torch.no_grad()
def reconstruction_error(
    pruner: OCPruner,
    x: torch.Tensor,
    kept: Selection | torch.Tensor,
    *,
    seed: int = 0,
    weighted: bool = False,
) -> torch.Tensor:
    """How badly the pruner's decoder rebuilds all tokens from the kept ones alone, relative to the variance.

    Slots are formed from the kept tokens, as many as there are, and the decoder sees nothing but these slots,
    the kept tokens and positions: what was left out leaks by no way.

    Args:
        pruner: with a decoder; the same for all selections that are compared.
        x: ``[B, N, in_dim]`` features that the pruner reads.
        kept: a selection, or its ``[B, T]`` indices.
        seed: of the slots' noise.
        weighted: weigh tokens by the area of their slot, as training does (slots formed from all tokens only
            for these weights).

    Returns:
        ``[B]`` float32.

    Raises:
        TypeError, ValueError: a wrong type or shape, a pruner without a decoder, or a selection whose images
            keep different numbers of tokens.
    """
    if pruner.decoder is None:
        raise ValueError(
            "this pruner has no decoder to rebuild with; train one, or load weights that have it"
        )
    if isinstance(kept, Selection) and kept.mask is not None:
        raise ValueError("images that keep different numbers of tokens are rebuilt one at a time")
    indices = _indices(x, kept)
    batch, tokens, width = x.shape
    count = indices.shape[1]
    rows = x.gather(1, indices[:, :, None].expand(-1, -1, width))
    hidden = torch.ones(batch, tokens, dtype=torch.bool, device=x.device).scatter(1, indices, False)
    training = pruner.training
    pruner.eval()
    try:
        slots, _ = pruner.slots(rows, count, seed=seed)
        rebuilt = pruner.decode(x, slots, hidden)
        attention = pruner.slots(x, count, seed=seed)[1] if weighted else None
    finally:
        pruner.train(training)
    wide = x.to(rebuilt.dtype)
    if attention is None:
        error = (rebuilt - wide).square().sum(dim=(1, 2))
    else:
        error = area_weighted_mse(rebuilt, wide, attention, reduction="none") * tokens * width
    return _relative(error, wide)


def _relative(error: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    total = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return torch.where(total > 0, error / torch.where(total > 0, total, 1.0), 0.0)


def _indices(x: torch.Tensor, kept: Selection | torch.Tensor) -> torch.Tensor:
    require_floating("x", x)
    require_shape("x", x, (None, None, None), "[B, N, C]")
    indices = kept.indices if isinstance(kept, Selection) else kept
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"kept must be a Selection or int64 indices; got {type(kept).__name__}")
    require_shape("kept", indices, (x.shape[0], None), "[B, T]")
    if indices.numel() == 0 or int(indices.min()) < 0 or int(indices.max()) >= x.shape[1]:
        raise ValueError(f"kept must hold indices of the {x.shape[1]} tokens of each image")
    if isinstance(kept, Selection) and kept.tokens not in (None, x.shape[1]):
        raise ValueError(f"x has {x.shape[1]} tokens per image, {kept.tokens} were selected from")
    return indices
