"""Slot Attention over encoder features: the plain form for training, the folded form for inference."""

from __future__ import annotations

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_count, require_floating, require_shape
from ocvtp_kernels.slot_attention import folded, reference
from ocvtp_kernels.slot_attention.folded import FoldedWeights, SlotStart, fold, start_from_slots
from ocvtp_kernels.slot_attention.reference import SlotAttentionWeights

__all__ = [
    "FoldedWeights",
    "SlotAttentionWeights",
    "SlotStart",
    "fold",
    "slot_assignment",
    "slot_attention",
    "start_from_slots",
]

# Any iteration count is defined; the bound only catches arguments in the wrong place.
_MAX_ITERATIONS = 1000


def slot_attention(
    features: torch.Tensor,
    slots: torch.Tensor,
    weights: SlotAttentionWeights,
    *,
    num_iters: int = 3,
    eps: float = 1e-5,
    truncate: bool = True,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder MLP and Slot Attention, differentiable in features, slots and weights (the training path).

    Source: OC-VTP (arXiv 2511.20439) and its official code: softmax over *slots*, weighted mean with
    ``eps`` added to the denominator, GRU, residual MLP. The attention returned is the last iteration's,
    computed from the slots that enter it.

    Args:
        features: ``[B, N, C]`` floating point, the output of one encoder layer without CLS.
        slots: ``[B, K, D]`` or ``[1, K, D]`` initial slots.
        weights: parameters, in the dtype of ``features``.
        num_iters: iterations, at least 1.
        eps: added to a slot's total attention before dividing by it.
        truncate: gradients skip all iterations but the last and flow straight through to the initial
            slots ("bi-level" truncation); ``False`` backpropagates through every iteration.
        dropout: probability inside the slots' MLP; 0 outside training.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``slots`` ``[B, K, D]`` and ``attention`` ``[B, K, N]``, which sums to 1 over slots.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    _check(features, slots, weights.encoder_fc1_weight, weights.query_weight, num_iters)
    resolve_backend(backend, "slot_attention", features.device)
    encoded = reference.encode(features, weights)
    return reference.slot_attention(encoded, slots, weights, num_iters, eps, truncate, dropout)


def slot_assignment(
    features: torch.Tensor,
    start: SlotStart,
    weights: FoldedWeights,
    *,
    num_iters: int = 3,
    eps: float = 1e-5,
    backend: str = "auto",
) -> torch.Tensor:
    """The last iteration's attention and nothing else (the inference path); equals :func:`slot_attention`'s.

    The last iteration's slot update is never computed, and key, value and LayerNorm-affine weights are
    already part of their neighbours (:func:`fold`), which is exact.

    Args:
        features: ``[B, N, C]`` floating point, in the dtype of ``weights``.
        start: first-iteration constants for ``[B or 1, K, D]`` slots, from :func:`start_from_slots`.
        weights: from :func:`fold`.
        num_iters: iterations, at least 1.
        eps: added to a slot's total attention before dividing by it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, K, N]``, which sums to 1 over slots.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    _check(features, start.slots, weights.encoder_fc1_weight, weights.query_weight, num_iters)
    resolve_backend(backend, "slot_attention", features.device)
    return folded.slot_assignment(features, start, weights, num_iters, eps)


def _check(
    features: torch.Tensor,
    slots: torch.Tensor,
    encoder_weight: torch.Tensor,  # [H, C]
    query_weight: torch.Tensor,  # [D or D + 1, D]
    num_iters: int,
) -> None:
    require_floating("features", features)
    require_floating("slots", slots)
    require_shape("features", features, (None, None, encoder_weight.shape[1]), "[B, N, C]")
    require_shape("slots", slots, (None, None, query_weight.shape[1]), "[B or 1, K, D]")
    if slots.shape[0] not in (1, features.shape[0]):
        raise ValueError(f"slots must have batch size 1 or {features.shape[0]}; got {slots.shape[0]}")
    require_count("num_iters", num_iters, _MAX_ITERATIONS, "a sane number of iterations")
