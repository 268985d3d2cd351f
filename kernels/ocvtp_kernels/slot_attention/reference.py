"""Slot Attention as the paper writes it. Slow, readable, float64-able: the oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

NORM_EPS = 1e-5  # every LayerNorm of the method


class SlotAttentionWeights(NamedTuple):
    """Parameters of the pruner. ``C`` input, ``H`` encoder hidden, ``D`` slot, ``M`` slot-MLP hidden width.

    Linear weights are ``[out, in]``; GRU weights stack the gates reset, update, new as torch does.
    """

    encoder_norm_weight: torch.Tensor  # [C]
    encoder_norm_bias: torch.Tensor  # [C]
    encoder_fc1_weight: torch.Tensor  # [H, C]
    encoder_fc1_bias: torch.Tensor  # [H]
    encoder_fc2_weight: torch.Tensor  # [D, H]
    encoder_fc2_bias: torch.Tensor  # [D]
    input_norm_weight: torch.Tensor  # [D]
    input_norm_bias: torch.Tensor  # [D]
    slot_norm_weight: torch.Tensor  # [D]
    slot_norm_bias: torch.Tensor  # [D]
    query_weight: torch.Tensor  # [D, D]
    key_weight: torch.Tensor  # [D, D]
    value_weight: torch.Tensor  # [D, D]
    gru_input_weight: torch.Tensor  # [3D, D]
    gru_hidden_weight: torch.Tensor  # [3D, D]
    gru_input_bias: torch.Tensor  # [3D]
    gru_hidden_bias: torch.Tensor  # [3D]
    mlp_norm_weight: torch.Tensor  # [D]
    mlp_norm_bias: torch.Tensor  # [D]
    mlp_fc1_weight: torch.Tensor  # [M, D]
    mlp_fc1_bias: torch.Tensor  # [M]
    mlp_fc2_weight: torch.Tensor  # [D, M]
    mlp_fc2_bias: torch.Tensor  # [D]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """LayerNorm over the last axis, with or without its affine part."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, NORM_EPS)


def encode(features: torch.Tensor, w: SlotAttentionWeights) -> torch.Tensor:
    """``[B, N, C] -> [B, N, D]``: LayerNorm, linear, exact (erf) GELU, linear."""
    hidden = layer_norm(features, w.encoder_norm_weight, w.encoder_norm_bias)
    hidden = F.gelu(F.linear(hidden, w.encoder_fc1_weight, w.encoder_fc1_bias))
    return F.linear(hidden, w.encoder_fc2_weight, w.encoder_fc2_bias)


def gru_gates(gates_in: torch.Tensor, gates_hidden: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The pointwise half of a GRU cell: both ``[..., 3D]`` pre-activations -> the new ``[..., D]``."""
    reset_in, update_in, new_in = gates_in.chunk(3, dim=-1)
    reset_hidden, update_hidden, new_hidden = gates_hidden.chunk(3, dim=-1)
    reset = torch.sigmoid(reset_in + reset_hidden)
    update = torch.sigmoid(update_in + update_hidden)
    new = torch.tanh(new_in + reset * new_hidden)
    return new + update * (hidden - new)


def next_slots(
    update: torch.Tensor, slots: torch.Tensor, w: SlotAttentionWeights, dropout: float
) -> torch.Tensor:
    """What the slots ``[B, K, D]`` become of their weighted means ``update``: GRU cell, residual MLP."""
    slots = gru_gates(
        F.linear(update, w.gru_input_weight, w.gru_input_bias),
        F.linear(slots, w.gru_hidden_weight, w.gru_hidden_bias),
        slots,
    )
    hidden = layer_norm(slots, w.mlp_norm_weight, w.mlp_norm_bias)
    hidden = F.gelu(F.linear(hidden, w.mlp_fc1_weight, w.mlp_fc1_bias))
    hidden = F.dropout(hidden, dropout, training=dropout > 0)
    return slots + F.linear(hidden, w.mlp_fc2_weight, w.mlp_fc2_bias)


def slot_attention(
    encoded: torch.Tensor,
    slots: torch.Tensor,
    w: SlotAttentionWeights,
    num_iters: int,
    eps: float,
    truncate: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, N, D]`` encoded, ``[B or 1, K, D]`` slots -> slots ``[B, K, D]``, attention ``[B, K, N]``."""
    initial = slots = slots.expand(encoded.shape[0], -1, -1)
    inputs = layer_norm(encoded, w.input_norm_weight, w.input_norm_bias)
    keys = F.linear(inputs, w.key_weight)
    values = F.linear(inputs, w.value_weight)
    attention = keys
    for iteration in range(num_iters):
        if truncate and iteration == num_iters - 1:
            slots = slots.detach() + initial - initial.detach()
        queries = F.linear(layer_norm(slots, w.slot_norm_weight, w.slot_norm_bias), w.query_weight)
        logits = queries @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5
        attention = logits.softmax(dim=1)  # the slots compete for each token
        update = attention / (attention.sum(dim=2, keepdim=True) + eps) @ values
        slots = next_slots(update, slots, w, dropout)
    return slots, attention
