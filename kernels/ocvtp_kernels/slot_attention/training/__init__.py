"""Slot Attention to train through: kernels where slots meet tokens, PyTorch everywhere else.

Weights change with every step, so nothing is folded; large products, norms, GRU and MLP are PyTorch's. What
takes the memory of the plain form is not kept but computed again in the backward pass:

* attention, one map for each iteration and another for the weights made of it, in the kernels;
* the encoder's activations, ``C + 2H + 2D`` numbers a token, for a group of images at a time;
* the slots' GRU and MLP, ``10D + 2M`` numbers a slot and iteration.

Kept are keys and values, and of each iteration that gradients flow through the slots, queries and means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ocvtp_kernels._backend import BackendUnavailableError, interpreted
from ocvtp_kernels.slot_attention.reference import SlotAttentionWeights, encode, layer_norm, next_slots
from ocvtp_kernels.slot_attention.training import op

__all__ = ["slot_attention"]

# Rows of tokens that are encoded at a time, or one image: what the backward pass has of the encoder in
# memory, 134 MB of float32 in its two hidden layers, and enough rows for efficient products.
_MOST_ROWS = 8192

_T = TypeVar("_T")


def slot_attention(
    features: torch.Tensor,
    slots: torch.Tensor,
    w: SlotAttentionWeights,
    num_iters: int,
    eps: float,
    truncate: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, N, C]`` features, ``[B or 1, K, D]`` slots -> slots ``[B, K, D]``, attention ``[B, K, N]``.

    Products are in the dtype of the weights, or of a surrounding autocast; the attention is float32.

    Raises:
        BackendUnavailableError: products in bfloat16, in Triton's interpreter.
    """
    initial = slots = slots.expand(features.shape[0], -1, -1)
    keys, values = _keys_and_values(features, w)
    if keys.dtype == torch.bfloat16 and interpreted():
        raise BackendUnavailableError(
            "slot_attention training can't run its Triton kernel: Triton's interpreter can't multiply "
            'bfloat16. Use backend="auto" or backend="torch"'
        )
    # Before torch 2.11 autocast keeps what it casts without gradients, and takes it for the last iteration
    # (pytorch #65766); it keeps parameters only. A list: torch 2.7 can't trace a generator.
    constant = SlotAttentionWeights(*[tensor.detach() for tensor in w])
    for _ in range(num_iters - 1):
        if truncate:
            with torch.no_grad():
                slots, _ = _iterate(keys, values, slots, constant, eps, dropout, False)
        else:
            slots, _ = _iterate(keys, values, slots, w, eps, dropout, False)
    if truncate:
        slots = slots.detach() + initial - initial.detach()
    return _iterate(keys, values, slots, w, eps, dropout, True)


def _iterate(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    w: SlotAttentionWeights,
    eps: float,
    dropout: float,
    return_attention: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One iteration: the next slots, and the attention that they were made of."""
    normed = layer_norm(slots, w.slot_norm_weight, w.slot_norm_bias)
    # Scaled before the product, which autocast rounds.
    queries = F.linear(normed * slots.shape[-1] ** -0.5, w.query_weight)
    mean, attention = op.slot_update(queries, keys, values, eps, return_attention)

    def step(mean: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return next_slots(mean, slots, w, dropout)

    return _recomputed(step, mean.to(slots.dtype), slots, random=dropout > 0), attention


def _keys_and_values(features: torch.Tensor, w: SlotAttentionWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, N, C]`` -> twice ``[B, N, D]``, in groups of whole images."""

    def project(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = layer_norm(encode(group, w), w.input_norm_weight, w.input_norm_bias)
        return F.linear(inputs, w.key_weight), F.linear(inputs, w.value_weight)

    batch, tokens, _ = features.shape
    step = max(1, _MOST_ROWS // tokens)
    if batch <= step:
        return _recomputed(project, features)
    keys, values = [], []
    for first in range(0, batch, step):
        some_keys, some_values = _recomputed(project, features[first : first + step])
        keys.append(some_keys)
        values.append(some_values)
    return torch.cat(keys), torch.cat(values)


def _recomputed(function: Callable[..., _T], *tensors: torch.Tensor, random: bool = False) -> _T:
    """``function(*tensors)``, of which nothing else is kept: the backward pass calls it again."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    result: _T = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=random)
    return result
