"""Which tokens an image keeps, and their rows."""

from __future__ import annotations

from typing import Literal

import torch

from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import require_count, require_floating, require_shape
from ocvtp_kernels._launch import MAX_IMAGES
from ocvtp_kernels.selection import op, reference, shapes

__all__ = [
    "NotFinite",
    "gather_tokens",
    "is_finite",
    "marked",
    "select_from_keys",
    "select_rows",
    "select_tokens",
]

#: What is done about an image whose slot attention or scores hold NaN or Inf. ``"allow"``: nothing, its
#: choice is any if there is NaN. ``"flag"``: its ``from_slots`` is -1. ``"grid"``: that, and the tokens that
#: it keeps are spread evenly. No launch is made for it, nothing waits, and the other images of the batch keep
#: their bits.
NotFinite = Literal["allow", "flag", "grid"]


def select_tokens(
    slot_attention: torch.Tensor,
    keep: int,
    fill_scores: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    not_finite: NotFinite = "allow",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick ``keep`` distinct tokens per image: every slot's top token, then the best-scored others.

    Tokens are ranked by (is some slot's top token, fill score descending, index ascending) and the
    first ``keep`` are returned in ascending order. With ``K <= keep`` every slot's pick survives; with
    more picks than ``keep``, those with the lowest fill scores go. Ties are always won by the lower
    index, both for a slot's top token and for the fill. One image's result does not depend on the
    batch around it. Source: selection and padding of OC-VTP (arXiv 2511.20439), without the official
    script's hash-order trimming.

    Args:
        slot_attention: ``[B, K, N]`` floating point, without NaN, any strides; only its order along ``N``
            matters, so probabilities and logarithms of them pick the same tokens.
        keep: tokens to keep, ``1 <= keep <= N``.
        fill_scores: ``[B, N]`` floating point, without NaN; ``None`` takes a token's largest slot attention.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernels take float16, bfloat16 and float32
            scores, and up to 4096 tokens.
        not_finite: see :data:`NotFinite`.

    Returns:
        ``indices`` ``[B, keep]`` int64, ascending and unique per row, and ``from_slots`` ``[B]``
        int64, how many of them some slot picked (-1: see ``not_finite``).

    Raises:
        TypeError, ValueError: a wrong type, rank, shape or budget.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    keep, fill_scores = _checked(slot_attention, keep, fill_scores)
    kind = _kind(not_finite)
    if _resolve(backend, slot_attention, fill_scores) == "triton":
        return op.select_tokens(slot_attention, keep, fill_scores, kind)
    return reference.select_tokens(slot_attention, keep, fill_scores, kind)


def select_rows(
    slot_attention: torch.Tensor,
    keep: int,
    fill_scores: torch.Tensor | None,
    x: torch.Tensor,
    *,
    backend: str = "auto",
    not_finite: NotFinite = "allow",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`select_tokens` and the kept rows of ``x``, as one operation: one launch on a GPU.

    (Two where the map of an image is so large, K x N > 65536 padded, that finding the top tokens is worth
    spreading over the GPU.)

    Args:
        slot_attention, keep, fill_scores, backend, not_finite: as in :func:`select_tokens`.
        x: ``[B, N, C]``, any strides and dtype (complex128 in the PyTorch reference alone).

    Returns:
        ``indices`` and ``from_slots`` as :func:`select_tokens`, and ``[B, keep, C]`` in the dtype of ``x``,
        differentiable in ``x``.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape or budget.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    keep, fill_scores = _checked(slot_attention, keep, fill_scores)
    require_shape("x", x, (slot_attention.shape[0], slot_attention.shape[2], None), "[B, N, C]")
    if x.device != slot_attention.device:
        raise ValueError(f"x is on {x.device}, slot_attention on {slot_attention.device}")
    kind = _kind(not_finite)
    if _resolve(backend, slot_attention, fill_scores, x) == "triton":
        return op.select_rows(slot_attention, keep, fill_scores, x, kind)
    indices, from_slots = reference.select_tokens(slot_attention, keep, fill_scores, kind)
    return indices, from_slots, reference.gather_tokens(x, indices)


def select_from_keys(
    keys: torch.Tensor,
    keep: int,
    scores: torch.Tensor,
    x: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    finite: torch.Tensor | None = None,
    not_finite: NotFinite = "allow",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """:func:`select_tokens`, or with ``x`` :func:`select_rows`, from top tokens that are known already.

    Args:
        keys: ``[B, T, K]`` int64 of :func:`ocvtp_kernels.slot_attention.top_tokens`. Of one that names no
            token PyTorch makes an error; the kernel takes it for none.
        keep: tokens to keep, ``1 <= keep <= N``.
        scores: ``[B, N]`` floating point, without NaN: fill scores, or each token's largest attention.
        x: ``[B, N, C]``, any strides and dtype, or ``None`` for indices alone.
        backend: as in :func:`select_tokens`.
        finite: ``[B, N]`` bool, whether a token's slot attention is finite; not needed to ``"allow"`` what
            is not.
        not_finite: see :data:`NotFinite`.

    Returns:
        ``indices`` and ``from_slots`` as :func:`select_tokens`, and the rows ``[B, keep, C]`` or ``None``.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape or budget.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be int64; got {keys.dtype}")
    require_floating("scores", scores)
    require_shape("keys", keys, (None, None, None), "[B, T, K]")
    require_shape("scores", scores, (keys.shape[0], None), "[B, N]")
    if 0 in (keys.shape[1], keys.shape[2], scores.shape[1]):
        raise ValueError(
            f"keys need a slot and a token; got keys {list(keys.shape)}, scores {list(scores.shape)}"
        )
    keep = require_count("keep", keep, scores.shape[1], "the number of tokens")
    if x is not None:
        require_shape("x", x, (*scores.shape, None), "[B, N, C]")
    kind = _kind(not_finite)
    if kind != shapes.ALLOW:
        if finite is None:
            raise ValueError(f'not_finite="{not_finite}" needs finite=, which keys don\'t tell')
        if finite.dtype != torch.bool:
            raise TypeError(f"finite must be bool; got {finite.dtype}")
        require_shape("finite", finite, (keys.shape[0], scores.shape[1]), "[B, N]")
    for name, given in (("scores", scores), ("x", x), ("finite", finite)):
        tensor = keys if given is None else given
        if tensor.device != keys.device:
            raise ValueError(f"{name} are on {tensor.device}, keys on {keys.device}")
    if _resolve(backend, scores[:, None], None, x) == "triton":
        return op.select_from_keys(keys, keep, scores, x, finite, kind)
    indices, from_slots = reference.select_from_keys(keys, keep, scores, finite, kind)
    return indices, from_slots, None if x is None else reference.gather_tokens(x, indices)


def is_finite(x: torch.Tensor) -> torch.Tensor:
    """``[B]`` bool: whether there is no NaN and no Inf in each image of ``[B, ...]``."""
    return reference.is_finite(x)


def marked(
    indices: torch.Tensor, from_slots: torch.Tensor, sound: torch.Tensor, tokens: int, not_finite: NotFinite
) -> tuple[torch.Tensor, torch.Tensor]:
    """A selection that was made otherwise, with what ``not_finite`` asks for done to it, in PyTorch.

    Args:
        indices: ``[B, keep]`` int64.
        from_slots: ``[B]`` int64.
        sound: ``[B]`` bool, false for images of which something is not finite.
        tokens: N.
        not_finite: see :data:`NotFinite`.

    Returns:
        Indices and ``from_slots`` as :func:`select_tokens`.

    Raises:
        ValueError: an unknown ``not_finite``.
    """
    kind = _kind(not_finite)
    if kind == shapes.ALLOW:
        return indices, from_slots
    return reference.told(indices, from_slots, sound, tokens, kind)


def gather_tokens(x: torch.Tensor, indices: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Rows of the kept tokens: ``out[b, t] = x[b, indices[b, t]]``. Differentiable in ``x``.

    Args:
        x: ``[B, N, C]``, any strides and dtype (complex128 in the PyTorch reference alone).
        indices: ``[B, keep]`` int64 in ``[0, N)``. Others are an error on a CPU; the kernel gives zeros.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, keep, C]`` in the dtype of ``x``. The gradient scatters rows back, adding those taken from the
        same token in their order, and is zero elsewhere.

    Raises:
        TypeError, ValueError: a wrong dtype, rank or shape.
        BackendUnavailableError: an explicit backend that can't run; says why.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64; got {indices.dtype}")
    require_shape("x", x, (None, None, None), "[B, N, C]")
    require_shape("indices", indices, (x.shape[0], None), "[B, keep]")
    if x.device != indices.device:
        raise ValueError(f"indices are on {indices.device}, x on {x.device}; move one with .to(device)")
    if resolve_backend(backend, "selection", x.device, lambda: _unsupported_rows(x)) == "triton":
        return op.gather_tokens(x, indices)
    return reference.gather_tokens(x, indices)


def _checked(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None
) -> tuple[int, torch.Tensor | None]:
    """Raise for bad arguments; how many to keep, and the fill scores on the right device."""
    require_floating("slot_attention", slot_attention)
    require_shape("slot_attention", slot_attention, (None, None, None), "[B, K, N]")
    batch, slots, tokens = slot_attention.shape
    if slots == 0 or tokens == 0:
        raise ValueError(f"slot_attention needs a slot and a token; got shape {[batch, slots, tokens]}")
    keep = require_count("keep", keep, tokens, "the number of tokens")
    if fill_scores is None:
        return keep, None
    require_floating("fill_scores", fill_scores)
    require_shape("fill_scores", fill_scores, (batch, tokens), "[B, N]")
    return keep, fill_scores.to(slot_attention.device)


def _kind(not_finite: str) -> int:
    kind = shapes.NOT_FINITE.get(not_finite)
    if kind is None:
        known = ", ".join(f'"{name}"' for name in shapes.NOT_FINITE)
        raise ValueError(f"not_finite must be one of {known}; got {not_finite!r}")
    return kind


def _resolve(
    backend: str,
    slot_attention: torch.Tensor,
    fill_scores: torch.Tensor | None,
    x: torch.Tensor | None = None,
) -> str:
    def unsupported() -> str | None:
        for scores in (slot_attention, slot_attention if fill_scores is None else fill_scores):
            if scores.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                return f"it compares scores in float32, and these are {scores.dtype}"
        if slot_attention.shape[2] > shapes.MAX_TOKENS:
            return f"it holds up to {shapes.MAX_TOKENS} tokens an image; got {slot_attention.shape[2]}"
        return _unsupported_rows(slot_attention if x is None else x)

    return resolve_backend(backend, "selection", slot_attention.device, unsupported)


def _unsupported_rows(x: torch.Tensor) -> str | None:
    if x.shape[0] > MAX_IMAGES:
        return f"it takes up to {MAX_IMAGES} images; got {x.shape[0]}"
    return None if x.dtype.itemsize <= 8 else f"it copies elements of up to 8 bytes; x is {x.dtype}"
