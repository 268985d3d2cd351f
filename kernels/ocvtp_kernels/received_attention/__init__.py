"""How much attention each token receives in one encoder layer."""

from __future__ import annotations

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_floating, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels.received_attention import reference

__all__ = ["received_attention"]


def received_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """Mean over heads and queries of ``softmax(q k^T * scale)``, without keeping the attention map.

    ``out[b, n] = mean_{h, m} softmax_n(q[b, h, m] . k[b, h, n] * scale)``; each row sums to 1. These
    are the fill scores of OC-VTP (arXiv 2511.20439; ``meanq`` in the official code), there computed
    from materialised attention maps of every layer.

    Args:
        q: ``[B, H, M, d]`` floating point queries. Leave out the queries that should not count.
        k: ``[B, H, N, d]`` floating point keys.
        scale: multiplies the logits; ``None`` is ``d ** -0.5``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, N]`` in float32 (float64 for float64 inputs). Averaging half-precision maps would leave
        about a hundred distinct scores for 576 tokens, so the accumulation is never in half precision,
        under autocast neither.

    Raises:
        TypeError, ValueError: a wrong type, rank or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    require_floating("q", q)
    require_floating("k", k)
    require_shape("q", q, (None, None, None, None), "[B, H, M, d]")
    require_shape("k", k, (q.shape[0], q.shape[1], None, q.shape[3]), "[B, H, N, d]")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q and k must not be empty; got {list(q.shape)} and {list(k.shape)}")
    resolve_backend(backend, "received_attention", q.device)
    with without_autocast(q.device):
        return reference.received_attention(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
