"""Selectors that keep tokens unlike each other, or standing for all others."""

from __future__ import annotations

import torch

from ocvtp.checks import check_finite
from ocvtp.methods._inputs import check_features, chosen
from ocvtp.selection import Selection


@torch.no_grad()
def farthest_point(features: torch.Tensor, keep: int, *, backend: str = "auto") -> Selection:
    """Greedily the token farthest from all kept ones; the first is the one nearest the image's mean.

    At most twice the least possible radius (:func:`ocvtp_kernels.diversity.farthest_points`). Of equal
    distances the lowest index wins.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.diversity import farthest_points

    keep = _checked(features, keep)
    return chosen(farthest_points(features, keep, ascending=False, backend=backend), features.shape[1])


@torch.no_grad()
def greedy_dpp(features: torch.Tensor, keep: int, *, backend: str = "auto") -> Selection:
    """Greedy MAP of a determinantal point process over cosine similarity: the largest volume, token by token.

    All tokens start alike, so the first kept is token 0
    (:func:`ocvtp_kernels.diversity.largest_volume`).

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``. Beyond the features' rank, where volumes are 0, the
            lowest indices left.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.diversity import largest_volume

    keep = _checked(features, keep)
    return chosen(largest_volume(features, keep, ascending=False, backend=backend), features.shape[1])


@torch.no_grad()
def k_medoids(features: torch.Tensor, keep: int, *, rounds: int = 15, backend: str = "auto") -> Selection:
    """Medoids of ``keep`` clusters: :func:`farthest_point`, then ``rounds`` of refinement.

    Every round assigns tokens to their nearest medoid and moves medoids to better members, only where the
    image's coverage error falls (:func:`ocvtp_kernels.coverage.refine`). 15 rounds converge on most images.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.
        rounds: at most; 0 leaves farthest points.
        backend: of both: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget or number of rounds, or NaN or Inf.
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.coverage import check_rounds, refine
    from ocvtp_kernels.diversity import farthest_points, in_range

    rounds = check_rounds(rounds)
    keep = _checked(features, keep)
    x = in_range(features) if rounds else features
    kept = farthest_points(x, keep, ascending=False, backend=backend)
    return chosen(refine(x, kept, rounds, backend=backend) if rounds else kept, x.shape[1])


def _checked(features: torch.Tensor, keep: int) -> int:
    keep = check_features(features, keep)
    check_finite("features", features)
    return keep
