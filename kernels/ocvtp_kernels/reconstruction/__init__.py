"""The reconstruction score: squared error weighted by how small the token's object is."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_floating, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._launch import MAX_IMAGES
from ocvtp_kernels.reconstruction import op, reference

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

    Every token belongs to the slot that attends to it most, of several the first; a slot's area is its share
    of the tokens, its weight ``area ** -power``, divided by the mean weight of the slots and then capped. A
    token's weight is the attention-weighted mean of slot weights; an image's loss the weighted mean of its
    tokens' squared errors. ``slot_attention`` only weighs: no gradient flows into it.

    Values are not looked at: a NaN among an image's inputs makes its loss NaN.

    Args:
        reconstruction: ``[B, N, C]`` floating point, any strides.
        features: ``[B, N, C]``, the target; may differ in dtype.
        slot_attention: ``[B, K, N]``, softmax over slots; may be a transposed view, and differ in dtype.
        empty_slots: ``"exclude"`` gives a slot that owns no token weight zero and leaves it out of the
            mean. ``"official"`` is the published behaviour, where such slots get the largest weight of
            all and, when many, most of the loss.
        reduction: ``"mean"`` over images, or ``"none"`` for ``[B]``.
        power: exponent of the area, a finite number.
        cap: largest slot weight, in units of the mean; > 0.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take float16, bfloat16 and float32.

    Returns:
        A scalar, or ``[B]``, in float32 (float64 for a float64 reconstruction), under autocast too. The
        kernels give an image the same bits whatever the batch. Differentiable, any number of times, in
        ``reconstruction`` and ``features``.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    require_floating("reconstruction", reconstruction)
    require_floating("features", features)
    require_floating("slot_attention", slot_attention)
    require_shape("reconstruction", reconstruction, (None, None, None), "[B, N, C]")
    batch, tokens, _ = reconstruction.shape
    require_shape("features", features, tuple(reconstruction.shape), "[B, N, C] of reconstruction")
    require_shape("slot_attention", slot_attention, (batch, None, tokens), "[B, K, N]")
    for name, tensor in (("features", features), ("slot_attention", slot_attention)):
        if tensor.device != reconstruction.device:
            raise ValueError(
                f"{name} is on {tensor.device}, reconstruction on {reconstruction.device}; "
                "move one with .to(device)"
            )
    if 0 in reconstruction.shape or 0 in slot_attention.shape:
        raise ValueError(
            f"nothing to compare: reconstruction has shape {list(reconstruction.shape)}, "
            f"slot_attention {list(slot_attention.shape)}"
        )
    if empty_slots not in get_args(EmptySlots):
        raise ValueError(f'empty_slots must be "exclude" or "official"; got {empty_slots!r}')
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction must be "mean" or "none"; got {reduction!r}')
    if not math.isfinite(power):
        raise ValueError(f"power must be a finite number; got {power!r}")
    if not cap > 0:
        raise ValueError(f"cap must be a positive number; got {cap!r}")
    tensors = reconstruction, features, slot_attention
    options = empty_slots == "exclude", float(power), float(cap)
    chosen = resolve_backend(backend, "reconstruction", reconstruction.device, lambda: _unsupported(*tensors))
    if chosen == "triton":
        per_image = op.area_weighted_mse(*tensors, *options)
    else:
        with without_autocast(reconstruction.device):
            per_image = reference.area_weighted_mse(*tensors, *options)
    return per_image.mean() if reduction == "mean" else per_image


def _unsupported(
    reconstruction: torch.Tensor, features: torch.Tensor, slot_attention: torch.Tensor
) -> str | None:
    """Why the kernels can't take these inputs."""
    tensors = {"reconstruction": reconstruction, "features": features, "slot_attention": slot_attention}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it computes in float32, and {name} is {tensor.dtype}"
    if reconstruction.shape[0] > MAX_IMAGES:
        return f"it takes up to {MAX_IMAGES} images; got {reconstruction.shape[0]}"
    return None
