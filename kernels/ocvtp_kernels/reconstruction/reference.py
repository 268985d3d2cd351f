"""Area-weighted squared error in plain PyTorch."""

from __future__ import annotations

import torch

#: The official code's floor for an area and for a total weight.
EPS = 1e-8


def slot_weights(slot_attention: torch.Tensor, exclude_empty: bool, power: float, cap: float) -> torch.Tensor:
    """``[B, K, N] -> [B, K]``: weight of each slot from the share of tokens it owns.

    Of slots that attend to a token alike, the lowest owns it.
    """
    owner = slot_attention.argmax(dim=1)  # [B, N]
    counts = torch.zeros_like(slot_attention[:, :, 0]).scatter_add_(
        1, owner, torch.ones_like(slot_attention[:, 0])
    )
    area = counts / owner.shape[1]
    weights = area.clamp_min(EPS) ** -power
    if exclude_empty:
        weights = torch.where(counts > 0, weights, 0.0)
        mean = weights.sum(dim=1, keepdim=True) / (counts > 0).sum(dim=1, keepdim=True)
    else:
        mean = weights.mean(dim=1, keepdim=True)
    return (weights / mean).clamp_max(cap)


def area_weighted_mse(
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    slot_attention: torch.Tensor,
    exclude_empty: bool,
    power: float,
    cap: float,
) -> torch.Tensor:
    """Loss of each image, ``[B]``. See :func:`ocvtp_kernels.reconstruction.area_weighted_mse`."""
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    attention = slot_attention.detach().to(dtype)
    per_slot = slot_weights(attention, exclude_empty, power, cap)
    per_token = (attention * per_slot[:, :, None]).sum(dim=1)  # [B, N]
    error = (reconstruction.to(dtype) - features.to(dtype)).square().mean(dim=2)
    return (per_token * error).sum(dim=1) / per_token.sum(dim=1).clamp_min(EPS)


def area_weighted_mse_backward(
    grad: torch.Tensor,
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    token_weights: torch.Tensor,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to ``reconstruction`` and ``features``; themselves differentiable.

    Args:
        grad: ``[B]``, of the losses.
        reconstruction, features: ``[B, N, C]``.
        token_weights: ``[B, N]``.
        total: ``[B]``, their sums.
    """
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    scale = 2.0 * grad / (reconstruction.shape[2] * total.clamp_min(EPS))
    difference = reconstruction.to(dtype) - features.to(dtype)
    gradient = difference * (token_weights * scale[:, None])[:, :, None]
    return gradient.to(reconstruction.dtype), (-gradient).to(features.dtype)


def area_weighted_mse_jvp(
    reconstruction_tangent: torch.Tensor,
    features_tangent: torch.Tensor,
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    token_weights: torch.Tensor,
    total: torch.Tensor,
) -> torch.Tensor:
    """Tangent of the losses, ``[B]``, of those of ``reconstruction`` and ``features``; other arguments as in
    :func:`area_weighted_mse_backward`.
    """
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    difference = reconstruction.to(dtype) - features.to(dtype)
    tangent = reconstruction_tangent.to(dtype) - features_tangent.to(dtype)
    error = 2.0 * (difference * tangent).mean(dim=2)
    return (token_weights * error).sum(dim=1) / total.clamp_min(EPS)
