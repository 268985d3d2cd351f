"""Slot Attention for PyTorch: operator schema, fake, FLOPs. The inference path; it has no gradient."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._library import define
from ocvtp_kernels.slot_attention.folded import FoldedWeights, SlotStart
from ocvtp_kernels.slot_attention.shapes import Assigned, token_tiles

__all__ = ["assign"]


def _launch(features: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    from ocvtp_kernels.slot_attention import triton as kernels

    starts = len(SlotStart._fields)
    tensors = starts + len(FoldedWeights._fields)
    start, weights = SlotStart(*arguments[:starts]), FoldedWeights(*arguments[starts:tensors])
    return tuple(kernels.assign(features, start, weights, *arguments[tensors:]))


def _fake(features: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    start = SlotStart(*arguments[: len(SlotStart._fields)])
    return_attention = arguments[-1]
    batch, tokens, _ = features.shape
    slots = start.queries.shape[1]
    tiles = token_tiles(slots, tokens, features.device, start.queries.dtype)
    return (
        features.new_empty(batch, tiles, slots, dtype=torch.int64),
        features.new_empty(batch, tokens, dtype=torch.float32),
        features.new_empty(batch, tokens, dtype=torch.bool),
        features.new_empty((batch, slots, tokens) if return_attention else (0,), dtype=torch.float32),
    )


def _flops(features: Any, *arguments: Any, **_: Any) -> int:
    """Products of the folded dataflow, each a multiplication and an addition."""
    starts = len(SlotStart._fields)
    tensors = starts + len(FoldedWeights._fields)
    start, w = SlotStart(*arguments[:starts]), FoldedWeights(*arguments[starts:tensors])
    updates = arguments[tensors] - 1
    batch, tokens, width = features
    slots = start.queries[1]
    (hidden, _), (slot_width, _), (mlp, _) = w.encoder_fc1_weight, w.encoder_fc2_weight, w.mlp_fc1_weight
    encoder = tokens * (width * hidden + hidden * slot_width)
    attention = tokens * slots * slot_width
    gates = 3 * slots * slot_width * slot_width  # the hidden side is known in the first iteration
    update = attention + gates + slots * slot_width * (2 * mlp + slot_width)
    products = encoder + (updates + 1) * attention + updates * update + max(updates - 1, 0) * gates
    return 2 * batch * products


_TENSORS = ", ".join(f"Tensor {name}" for name in (*SlotStart._fields, *FoldedWeights._fields))
_slot_assignment = define(
    f"slot_assignment(Tensor features, {_TENSORS}, SymInt num_iters, float eps, bool tf32,"
    " bool return_attention) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    _flops,
)


def assign(
    features: torch.Tensor,
    start: SlotStart,
    weights: FoldedWeights,
    num_iters: int,
    eps: float,
    tf32: bool,
    return_attention: bool,
) -> Assigned:
    """The kernels' last iteration; see :func:`ocvtp_kernels.slot_attention.top_tokens`."""
    tensors = [tensor.detach() for tensor in (features, *start, *weights)]
    return Assigned(*_slot_assignment(*tensors, num_iters, eps, tf32, return_attention))
