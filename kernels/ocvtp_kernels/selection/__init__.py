"""Which tokens an image keeps, and their rows."""

from __future__ import annotations

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_count, require_floating, require_shape
from ocvtp_kernels.selection import reference

__all__ = ["gather_tokens", "select_tokens"]


def select_tokens(
    slot_attention: torch.Tensor,
    keep: int,
    fill_scores: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick ``keep`` distinct tokens per image: every slot's top token, then the best-scored others.

    Tokens are ranked by (is some slot's top token, fill score descending, index ascending) and the
    first ``keep`` are returned in ascending order. With ``K <= keep`` every slot's pick survives; with
    more picks than ``keep``, those with the lowest fill scores go. Ties are always won by the lower
    index, both for a slot's top token and for the fill. One image's result does not depend on the
    batch around it. Source: selection and padding of OC-VTP (arXiv 2511.20439), without the official
    script's hash-order trimming.

    Args:
        slot_attention: ``[B, K, N]`` floating point; only its order along ``N`` matters, so
            probabilities and logarithms of them pick the same tokens.
        keep: tokens to keep, ``1 <= keep <= N``.
        fill_scores: ``[B, N]`` floating point; ``None`` uses each token's largest slot attention.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``indices`` ``[B, keep]`` int64, ascending and unique per row, and ``from_slots`` ``[B]``
        int64, how many of them some slot picked.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape or budget.
        BackendUnavailableError: an explicit backend that can't run.
    """
    require_floating("slot_attention", slot_attention)
    require_shape("slot_attention", slot_attention, (None, None, None), "[B, K, N]")
    batch, slots, tokens = slot_attention.shape
    if slots == 0 or tokens == 0:
        raise ValueError(f"slot_attention needs a slot and a token; got shape {[batch, slots, tokens]}")
    require_count("keep", keep, tokens, "the number of tokens")
    if fill_scores is not None:
        require_floating("fill_scores", fill_scores)
        require_shape("fill_scores", fill_scores, (batch, tokens), "[B, N]")
    resolve_backend(backend, "selection", slot_attention.device)
    return reference.select_tokens(slot_attention, keep, fill_scores)


def gather_tokens(x: torch.Tensor, indices: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Rows of the kept tokens: ``out[b, t] = x[b, indices[b, t]]``. Differentiable in ``x``.

    Args:
        x: ``[B, N, C]``, any dtype.
        indices: ``[B, keep]`` int64 in ``[0, N)``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, keep, C]`` in the dtype of ``x``. The gradient scatters rows back and is zero elsewhere.

    Raises:
        TypeError, ValueError: a wrong dtype, rank or shape.
        BackendUnavailableError: an explicit backend that can't run.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64; got {indices.dtype}")
    require_shape("x", x, (None, None, None), "[B, N, C]")
    require_shape("indices", indices, (x.shape[0], None), "[B, keep]")
    resolve_backend(backend, "selection", x.device)
    return reference.gather_tokens(x, indices)
