"""Selectors that keep tokens unlike each other, or standing for all others."""

from __future__ import annotations

import torch

from ocvtp.checks import check_finite
from ocvtp.methods._inputs import check_features, chosen
from ocvtp.selection import Selection
from ocvtp_kernels._device import without_autocast

#: A squared volume below this share of a token's own is rounding.
_EPS = 1e-5


@torch.no_grad()
def farthest_point(features: torch.Tensor, keep: int) -> Selection:
    """Greedily the token farthest from all kept ones; the first is the one nearest the image's mean.

    At most twice the least possible radius (T. F. Gonzalez, Theoretical Computer Science 38, 1985). Of equal
    distances the lowest index wins.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    x, keep = _checked(features, keep)
    with without_autocast(x.device):
        return chosen(_farthest(x, keep), x.shape[1])


def _farthest(x: torch.Tensor, keep: int) -> torch.Tensor:
    """``[B, keep]`` in the order of choice."""
    if keep == x.shape[1]:
        return torch.arange(keep, device=x.device).expand(len(x), -1)
    x = x - x.mean(dim=1, keepdim=True)  # products then lose fewer digits than their difference can spare
    square = x.square().sum(dim=2)
    token = square.argmin(dim=1)
    nearest = torch.full_like(square, float("inf"))
    order = [token]
    for _ in range(keep - 1):
        at = token[:, None]
        product = (x @ _row(x, token).mT)[:, :, 0]
        distance = (square + square.gather(1, at) - 2.0 * product).clamp_min(0.0)
        # Below any distance, so that even copies of what is kept come before it.
        nearest = torch.minimum(nearest, distance).scatter(1, at, -1.0)
        token = nearest.argmax(dim=1)
        order.append(token)
    return torch.stack(order, dim=1)


@torch.no_grad()
def greedy_dpp(features: torch.Tensor, keep: int) -> Selection:
    """Greedy MAP of a determinantal point process over cosine similarity: the largest volume, token by token.

    By the incremental Cholesky factor of Chen, Zhang and Zhou, "Fast Greedy MAP Inference for Determinantal
    Point Process" (arXiv 1709.05135). The kernel is the Gram matrix of normalised features, never stored
    whole. All tokens start alike, so the first kept is token 0.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``. Beyond the features' rank, where volumes are 0, the
            lowest indices left.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    x, keep = _checked(features, keep)
    with without_autocast(x.device):
        return chosen(_largest_volume(x, keep), x.shape[1])


def _largest_volume(x: torch.Tensor, keep: int) -> torch.Tensor:
    """``[B, keep]`` in the order of choice."""
    x = torch.nn.functional.normalize(x, dim=2)
    batch, tokens, _ = x.shape
    factor = x.new_zeros(batch, keep, tokens)  # row i: all tokens along the i-th kept one's own direction
    left = x.new_ones(batch, tokens)  # squared volume that a token would add; below 0: kept already
    token = left.argmax(dim=1)
    order = [token]
    for i in range(keep - 1):
        at = token[:, None]
        similarity = (x @ _row(x, token).mT)[:, :, 0]
        known = factor.gather(2, at[:, None].expand(-1, keep, -1))  # [B, keep, 1]
        direction = similarity - (factor * known).sum(dim=1)
        direction = direction / left.gather(1, at).clamp_min(_EPS).sqrt()
        factor[:, i] = direction
        rest = left - direction.square()
        rest = torch.where(rest < _EPS, 0.0, rest)
        left = torch.where(left < 0, left, rest).scatter(1, at, -1.0)
        token = left.argmax(dim=1)
        order.append(token)
    return torch.stack(order, dim=1)


@torch.no_grad()
def k_medoids(features: torch.Tensor, keep: int, *, rounds: int = 15, backend: str = "auto") -> Selection:
    """Medoids of ``keep`` clusters: :func:`farthest_point`, then ``rounds`` of refinement.

    Every round assigns tokens to their nearest medoid and moves medoids to better members, only where the
    image's coverage error falls (:func:`ocvtp_kernels.coverage.refine`). 15 rounds converge on most images.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.
        rounds: at most; 0 leaves farthest points.
        backend: of the rounds: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget or number of rounds, or NaN or Inf.
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.coverage import check_rounds, refine

    rounds = check_rounds(rounds)
    x, keep = _checked(features, keep)
    with without_autocast(x.device):
        kept = _farthest(x, keep)
        return chosen(refine(x, kept, rounds, backend=backend) if rounds else kept, x.shape[1])


def _checked(features: torch.Tensor, keep: int) -> tuple[torch.Tensor, int]:
    """``features`` in at least float32, one layout and one range, whose squares don't overflow; ``keep``.

    The order of a sum decides ties, say in pairs. An image's largest value is brought near 1 by a power of
    two: no digit changes.
    """
    keep = check_features(features, keep)
    check_finite("features", features)
    x = features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()
    _, exponent = torch.frexp(x.abs().amax(dim=(1, 2), keepdim=True))
    return torch.ldexp(x, -exponent.clamp(-120, 120)), keep  # by a factor that is an ordinary float32


def _row(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``[B, 1, C]``: the token of each image."""
    return x.gather(1, token[:, None, None].expand(-1, 1, x.shape[2]))
