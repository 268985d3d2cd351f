"""The reconstruction score: squared error weighted by how small the token's object is."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_floating, require_shape
from ocvtp_kernels.reconstruction import reference

__all__ = ["EmptySlots", "Reduction", "area_weighted_mse"]

EmptySlots = Literal["exclude", "official"]
Reduction = Literal["mean", "none"]


def area_weighted_mse(
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    slot_attention: torch.Tensor,
    *,
    empty_slots: EmptySlots = "exclude",
    reduction: Reduction = "mean",
    power: float = 0.5,
    cap: float = 10.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Area-weighted mean squared error of OC-VTP (arXiv 2511.20439, ``AreaWeightedMSELoss``).

    Every token belongs to the slot that attends to it most; a slot's area is its share of the tokens, its
    weight ``area ** -power``, divided by the mean weight of the slots and then capped. A token's weight
    is the attention-weighted mean of slot weights; an image's loss the weighted mean of its tokens' squared
    errors. ``slot_attention`` only weighs: no gradient flows into it.

    Args:
        reconstruction: ``[B, N, C]`` floating point.
        features: ``[B, N, C]``, the target.
        slot_attention: ``[B, K, N]``, softmax over slots.
        empty_slots: ``"exclude"`` gives a slot that owns no token weight zero and leaves it out of the
            mean. ``"official"`` is the published behaviour, where such slots get the largest weight of
            all and, when many, most of the loss.
        reduction: ``"mean"`` over images, or ``"none"`` for ``[B]``.
        power: exponent of the area.
        cap: largest slot weight, in units of the mean.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        A scalar, or ``[B]``, in at least float32.

    Raises:
        TypeError, ValueError: a wrong type, shape or option.
        BackendUnavailableError: an explicit backend that can't run.
    """
    require_floating("reconstruction", reconstruction)
    require_floating("features", features)
    require_floating("slot_attention", slot_attention)
    require_shape("reconstruction", reconstruction, (None, None, None), "[B, N, C]")
    batch, tokens, _ = reconstruction.shape
    require_shape("features", features, tuple(reconstruction.shape), "[B, N, C] of reconstruction")
    require_shape("slot_attention", slot_attention, (batch, None, tokens), "[B, K, N]")
    if 0 in reconstruction.shape or 0 in slot_attention.shape:
        raise ValueError(f"nothing to compare: reconstruction has shape {list(reconstruction.shape)}")
    if empty_slots not in get_args(EmptySlots):
        raise ValueError(f'empty_slots must be "exclude" or "official"; got {empty_slots!r}')
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction must be "mean" or "none"; got {reduction!r}')
    resolve_backend(backend, "reconstruction", reconstruction.device)
    per_image = reference.area_weighted_mse(
        reconstruction, features, slot_attention, empty_slots == "exclude", power, cap
    )
    return per_image.mean() if reduction == "mean" else per_image
