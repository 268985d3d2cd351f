"""Slot Attention over encoder features: the plain form for training, the folded form for inference."""

from __future__ import annotations

import torch

from ocvtp_kernels._backend import BackendUnavailableError, resolve_backend
from ocvtp_kernels._checks import require_count, require_floating, require_shape
from ocvtp_kernels._launch import MAX_IMAGES
from ocvtp_kernels._transforms import differentiated, transformed
from ocvtp_kernels.slot_attention import folded, op, reference, shapes, training
from ocvtp_kernels.slot_attention.folded import FoldedWeights, SlotStart, fold, start_from_slots
from ocvtp_kernels.slot_attention.reference import SlotAttentionWeights
from ocvtp_kernels.slot_attention.shapes import Places, TopTokens

__all__ = [
    "FoldedWeights",
    "Places",
    "SlotAttentionWeights",
    "SlotStart",
    "TopTokens",
    "fold",
    "normalise_into",
    "normalise_tokens",
    "slot_assignment",
    "slot_attention",
    "start_from_slots",
    "top_tokens",
    "top_tokens_into",
    "why_no_kernel",
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
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. Triton keeps no map and no activation of the encoder
            for the backward pass, which computes them again, and has no second derivative.

    Returns:
        ``slots`` ``[B, K, D]`` and ``attention`` ``[B, K, N]``, which sums to 1 over slots; from Triton the
        attention is float32.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    num_iters = _check(features, slots, weights.encoder_fc1_weight, weights.query_weight, num_iters)

    def unsupported() -> str | None:
        dtype = weights.query_weight.dtype
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it multiplies in float32, float16 and bfloat16, and the weights are {dtype}"
        if transformed(features, slots, *weights):
            return "it has no rules for torch.func and dual numbers"
        images = features.shape[0]
        return f"it takes up to {MAX_IMAGES} images; got {images}" if images > MAX_IMAGES else None

    if resolve_backend(backend, "slot_attention training", features.device, unsupported) == "triton":
        return training.slot_attention(features, slots, weights, num_iters, eps, truncate, dropout)
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
    tf32: bool = False,
) -> torch.Tensor:
    """The last iteration's attention and nothing else (the inference path); equals :func:`slot_attention`'s.

    The last iteration's slot update is never computed, and key, value and LayerNorm-affine weights are
    already part of their neighbours (:func:`fold`), which is exact. Not differentiable in Triton.

    Args:
        features: ``[B, N, C]`` floating point; in the dtype of ``weights`` for PyTorch, any strides and up to
            32 bits for Triton.
        start: first-iteration constants for ``[B or 1, K, D]`` slots, from :func:`start_from_slots`.
        weights: from :func:`fold`. Their dtype is that of the matrix products; float16 ones, accumulated in
            float32, take Triton.
        num_iters: iterations, at least 1.
        eps: added to a slot's total attention before dividing by it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        tf32: let Triton round the operands of float32 products to TF32.

    Returns:
        ``[B, K, N]``, which sums to 1 over slots; float32 from Triton.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend, or a precision, that can't run.
    """
    resolved, num_iters = _resolve(backend, features, start, weights, num_iters, tf32)
    if resolved == "triton":
        return op.assign(features, start, weights, num_iters, eps, tf32, True).attention
    return folded.slot_assignment(features, start, weights, num_iters, eps)


def top_tokens(
    features: torch.Tensor,
    start: SlotStart,
    weights: FoldedWeights,
    *,
    num_iters: int = 3,
    eps: float = 1e-5,
    backend: str = "auto",
    tf32: bool = False,
) -> TopTokens:
    """Every slot's top token, as :func:`ocvtp_kernels.selection.select_from_keys` takes them.

    What selection needs of :func:`slot_assignment`, whose arguments these are: Triton never writes the map.
    Which tokens are top is the same, bit for bit.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend, or a precision, that can't run.
    """
    resolved, num_iters = _resolve(backend, features, start, weights, num_iters, tf32)
    if resolved == "triton":
        found = op.assign(features, start, weights, num_iters, eps, tf32, False)
        return TopTokens(found.keys, found.largest, found.finite)
    return TopTokens(*folded.top_tokens(folded.slot_assignment(features, start, weights, num_iters, eps)))


def normalise_tokens(
    features: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """The first step of :func:`top_tokens`: LayerNorm over channels, without affine part.

    With :func:`top_tokens_into` for a CUDA graph of what follows: features, which are somewhere else every
    time, go straight to where the graph reads. Not an operator: nothing can trace or differentiate it.

    Args:
        features: ``[B, N, C]`` floating point, any strides, up to 32 bits for Triton.
        dtype: of the result: that of the weights.
        out: where to put it, ``[B, N, C]`` contiguous; ``None`` makes a place.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    require_floating("features", features)
    require_shape("features", features, (None, None, None), "[B, N, C]")
    features = features.detach()
    if out is None:
        out = torch.empty(features.shape, dtype=dtype, device=features.device)
    require_shape("out", out, tuple(features.shape), "of features")
    if out.dtype != dtype or out.device != features.device or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, {dtype} and on {features.device}")

    def unsupported() -> str | None:
        if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes features in float32, float16 and bfloat16, not {features.dtype}"
        return why_no_kernel(features.shape[0], features.shape[2])

    if resolve_backend(backend, "slot_attention", features.device, unsupported) == "triton":
        normalise_into(features, out)
        return out
    return out.copy_(folded.normalise(features, dtype))


def normalise_into(features: torch.Tensor, out: torch.Tensor) -> None:
    """:func:`normalise_tokens` in Triton, unchecked: for who calls it every time and has checked once."""
    from ocvtp_kernels.slot_attention import triton as kernels

    kernels.normalise_into(features, out)


def top_tokens_into(
    places: Places,
    normalised: torch.Tensor,
    start: SlotStart,
    weights: FoldedWeights,
    *,
    num_iters: int = 3,
    eps: float = 1e-5,
    backend: str = "auto",
    tf32: bool = False,
) -> TopTokens:
    """:func:`top_tokens` of what :func:`normalise_tokens` made, into memory that is there: the same bits.

    Args:
        places: where results go, from :meth:`Places.empty`.
        normalised: ``[B, N, C]`` contiguous, in the dtype of the weights.
        start, weights, num_iters, eps, backend, tf32: as for :func:`top_tokens`.

    Returns:
        ``places.top``.

    Raises:
        TypeError, ValueError: a wrong type or shape.
        BackendUnavailableError: an explicit backend, or a precision, that can't run.
    """
    resolved, num_iters = _resolve(backend, normalised, start, weights, num_iters, tf32)
    if normalised.dtype != weights.query_weight.dtype or not normalised.is_contiguous():
        raise ValueError(f"normalised must be contiguous and {weights.query_weight.dtype}")
    top = places.top
    if resolved == "triton":
        from ocvtp_kernels.slot_attention import triton as kernels

        detached = (SlotStart(*(t.detach() for t in start)), FoldedWeights(*(t.detach() for t in weights)))
        kernels.assign(normalised.detach(), *detached, num_iters, eps, tf32, False, normalised=True, into=top)
        return top
    attention = folded.slot_assignment(normalised, start, weights, num_iters, eps, normalised=True)
    for place, found in zip(top, folded.top_tokens(attention), strict=True):
        place.copy_(found)
    return top


def why_no_kernel(images: int, width: int) -> str | None:
    """Why the inference kernels can't take so many images of so many channels, or ``None``."""
    if width > shapes.MAX_WIDTH:
        return f"it takes up to {shapes.MAX_WIDTH} channels; got {width}"
    return f"it takes up to {MAX_IMAGES} images; got {images}" if images > MAX_IMAGES else None


def _resolve(
    backend: str,
    features: torch.Tensor,
    start: SlotStart,
    weights: FoldedWeights,
    num_iters: int,
    tf32: bool,
) -> tuple[str, int]:
    """What runs, and the number of iterations; raises for bad arguments."""
    num_iters = _check(features, start.slots, weights.encoder_fc1_weight, weights.query_weight, num_iters)
    dtype = weights.query_weight.dtype
    if start.queries.dtype != dtype:
        raise TypeError(
            f"start has {start.queries.dtype} queries, the weights are {dtype}; make it with "
            "start_from_slots(slots, weights)"
        )
    for tensor in (*start, *weights):
        if tensor.device != features.device:
            raise ValueError(
                f"features are on {features.device}, start or weights on {tensor.device}; "
                "move one with .to(device)"
            )

    def unsupported() -> str | None:
        if dtype not in (torch.float32, torch.float16):
            return f"it multiplies in float32 and float16, and the weights are {dtype}"
        if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes features in float32, float16 and bfloat16, not {features.dtype}"
        if (reason := why_no_kernel(features.shape[0], features.shape[2])) is not None:
            return reason
        if differentiated(features, *start, *weights):
            return "it has no gradient: use torch.no_grad(), or slot_attention to train"
        return None

    resolved = resolve_backend(backend, "slot_attention", features.device, unsupported)
    if resolved == "torch" and (tf32 or dtype == torch.float16):
        asked = "TF32 products" if tf32 else "float16 weights"
        raise BackendUnavailableError(
            f"{asked} need the Triton kernels, which can't run here; use float32 weights without tf32"
        )
    return resolved, num_iters


def _check(
    features: torch.Tensor,
    slots: torch.Tensor,
    encoder_weight: torch.Tensor,  # [H, C]
    query_weight: torch.Tensor,  # [D or D + 1, D]
    num_iters: int,
) -> int:
    """Raise for bad arguments; the number of iterations."""
    require_floating("features", features)
    require_floating("slots", slots)
    require_shape("features", features, (None, None, encoder_weight.shape[1]), "[B, N, C]")
    require_shape("slots", slots, (None, None, query_weight.shape[1]), "[B or 1, K, D]")
    if features.shape[1] == 0 or slots.shape[1] == 0:
        raise ValueError(
            f"a slot and a token are needed; got features {list(features.shape)}, slots {list(slots.shape)}"
        )
    if slots.shape[0] not in (1, features.shape[0]):
        raise ValueError(f"slots must have batch size 1 or {features.shape[0]}; got {slots.shape[0]}")
    return require_count("num_iters", num_iters, _MAX_ITERATIONS, "a sane number of iterations")
