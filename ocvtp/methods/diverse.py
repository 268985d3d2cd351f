"""Selectors that keep tokens unlike each other, or standing for all others."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import check_features, chosen, settled, sound_images
from ocvtp.selection import Selection
from ocvtp.watch import OnInvalid


@torch.no_grad()
def farthest_point(
    features: torch.Tensor, keep: int, *, backend: str = "auto", on_invalid: OnInvalid = "raise"
) -> Selection:
    """Greedily the token farthest from all kept ones; the first is the one nearest the image's mean.

    At most twice the least possible radius (:func:`ocvtp_kernels.diversity.farthest_points`). Of equal
    distances the lowest index wins.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        on_invalid: of images with NaN or Inf, see :class:`ocvtp.OCPruner`.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf (on a GPU a later call raises it).
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.diversity import farthest_points

    keep = check_features(features, keep)
    sound = sound_images("features", features, on_invalid)
    kept = farthest_points(features, keep, ascending=False, backend=backend)
    return settled(chosen(kept, features.shape[1]), sound, "features", on_invalid)


@torch.no_grad()
def greedy_dpp(
    features: torch.Tensor, keep: int, *, backend: str = "auto", on_invalid: OnInvalid = "raise"
) -> Selection:
    """Greedy MAP of a determinantal point process over cosine similarity: the largest volume, token by token.

    All tokens start alike, so the first kept is token 0
    (:func:`ocvtp_kernels.diversity.largest_volume`).

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``. Beyond the features' rank, where volumes are 0, the
            lowest indices left.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        on_invalid: of images with NaN or Inf, see :class:`ocvtp.OCPruner`.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf (on a GPU a later call raises it).
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.diversity import largest_volume

    keep = check_features(features, keep)
    sound = sound_images("features", features, on_invalid)
    kept = largest_volume(features, keep, ascending=False, backend=backend)
    return settled(chosen(kept, features.shape[1]), sound, "features", on_invalid)


@torch.no_grad()
def k_medoids(
    features: torch.Tensor,
    keep: int,
    *,
    rounds: int = 15,
    backend: str = "auto",
    on_invalid: OnInvalid = "raise",
) -> Selection:
    """Medoids of ``keep`` clusters: :func:`farthest_point`, then ``rounds`` of refinement.

    Every round assigns tokens to their nearest medoid and moves medoids to better members, only where the
    image's coverage error falls (:func:`ocvtp_kernels.coverage.refine`). 15 rounds converge on most images.

    Args:
        features: ``[B, N, C]`` finite floating point; computes in at least float32.
        keep: tokens to keep, ``1 <= keep <= N``.
        rounds: at most; 0 leaves farthest points.
        backend: of both: ``"auto"``, ``"torch"`` or ``"triton"``.
        on_invalid: of images with NaN or Inf, see :class:`ocvtp.OCPruner`.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget or number of rounds, or NaN or Inf; on a GPU a
            later call raises that.
        BackendUnavailableError: an explicit backend that can't run.
    """
    from ocvtp_kernels.coverage import check_rounds, refine
    from ocvtp_kernels.diversity import farthest_points, in_range

    rounds = check_rounds(rounds)
    keep = check_features(features, keep)
    sound = sound_images("features", features, on_invalid)
    x = in_range(features) if rounds else features
    kept = farthest_points(x, keep, ascending=False, backend=backend)
    kept = refine(x, kept, rounds, backend=backend) if rounds else kept
    return settled(chosen(kept, x.shape[1]), sound, "features", on_invalid)
