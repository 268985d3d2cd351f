"""How much attention each token receives in one encoder layer."""

from __future__ import annotations

import math

import torch

from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._backend import interpreted, resolve_backend
from ocvtp_kernels._checks import require, require_floating, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._launch import MAX_IMAGES
from ocvtp_kernels._transforms import values
from ocvtp_kernels.received_attention import op, reference, shapes

__all__ = ["received_attention"]


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float | None = None,
    *,
    lse: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean over heads and queries of ``softmax(q k^T * scale)``, without keeping the attention map.

    ``out[b, n] = mean_{h, m} softmax_n(q[b, h, m] . k[b, h, n] * scale)``; each row sums to 1. These
    are the fill scores of OC-VTP (arXiv 2511.20439; ``meanq`` in the official code), there computed
    from materialised attention maps of every layer.

    Which queries count is the caller's to say, by a view: ``q[:, :, 1:]`` leaves out a class token's. All
    keys that a query attends to take part in its softmax; to leave some out of the result, slice it. With a
    given ``lse`` the normalisation is known, and ``k`` may hold just the keys that matter.

    Args:
        q: ``[B, H, M, d]`` floating point queries, any strides.
        k: ``[B, H, N, d]`` floating point keys, any strides.
        scale: multiplies the logits, > 0; ``None`` is ``d ** -0.5``.
        lse: ``[B, H, M]`` log-sum-exp of each query's scaled logits (natural logarithm), as FlashAttention
            returns it; saves a pass over the keys. ``None`` computes it.
        cu_seqlens: ``[S + 1]`` int32 or int64, ascending from 0 to N: B = 1 and M = N, and the tokens
            between two bounds are one sequence that attends to itself (packed images, windows). Means are
            then over a segment's own queries, and each segment's scores sum to 1.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take float16, bfloat16 and float32 with
            ``d`` <= 128 and up to 4096 segments.

    Returns:
        ``[B, N]`` in float32 (float64 for float64 inputs). Averaging half-precision maps would leave
        about a hundred distinct scores for 576 tokens, so the accumulation is never in half precision,
        under autocast neither. An image's scores have the same bits whatever the strides and the batch around
        it, except from compiled PyTorch. Differentiable in ``q``, ``k`` and ``lse``.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape or scale; segments that don't cover the tokens. On a
            GPU, where nobody looks at them, the result of such segments is NaN.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    require_floating("q", q)
    require_floating("k", k)
    require_shape("q", q, (None, None, None, None), "[B, H, M, d]")
    require_shape("k", k, (q.shape[0], q.shape[1], None, q.shape[3]), "[B, H, N, d]")
    for name, tensor in (("k", k), ("lse", q if lse is None else lse)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; move one with .to(device)")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q and k must not be empty; got {list(q.shape)} and {list(k.shape)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number; got {scale!r}")
    if lse is not None:
        require_floating("lse", lse)
        require_shape("lse", lse, (q.shape[0], q.shape[1], q.shape[2]), "[B, H, M]")
    if cu_seqlens is not None:
        _check_segments(cu_seqlens, q, k)
    chosen = resolve_backend(backend, "received_attention", q.device, lambda: _unsupported(q, k, cu_seqlens))
    if chosen == "triton":
        return op.received_attention(q, k, float(scale), lse, cu_seqlens)
    factor = scale

    def received(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (reference.received_attention(q, k, factor, lse, cu_seqlens),)

    with without_autocast(q.device):
        if torch.compiler.is_compiling():  # one graph for any number of images
            return received(q, k, lse)[0]
        return image_by_image(received, q, k, lse)[0]


def _unsupported(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> str | None:
    """Why the kernels can't take these inputs."""
    if q.dtype != k.dtype:
        return f"q is {q.dtype} and k is {k.dtype}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float32, and q and k are {q.dtype}"
    if q.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter can't multiply bfloat16"
    if max(q.shape[:2]) > MAX_IMAGES:
        return f"it takes up to {MAX_IMAGES} images and heads; got {list(q.shape[:2])}"
    if q.shape[3] > shapes.MAX_HEAD_DIM:
        return f"its head dim is at most {shapes.MAX_HEAD_DIM}, and q's is {q.shape[3]}"
    if cu_seqlens is not None and cu_seqlens.shape[0] - 1 > shapes.MAX_SEGMENTS:
        return f"it takes up to {shapes.MAX_SEGMENTS} segments; got {cu_seqlens.shape[0] - 1}"
    return None


def _check_segments(cu_seqlens: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise TypeError(
            f"cu_seqlens must be a vector of int32 or int64; got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}; move it with .to(device)")
    if q.shape[0] != 1 or q.shape[2] != k.shape[2] or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens needs q and k of shape [1, H, N, d] and at least two bounds; "
            f"got {list(q.shape)}, {list(k.shape)} and {cu_seqlens.shape[0]} bounds"
        )
    if values(cu_seqlens).device.type != "cpu":
        return
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == k.shape[2]) & (cu_seqlens.diff() >= 0).all()
    require(good, "cu_seqlens must ascend from 0 to the number of tokens")
