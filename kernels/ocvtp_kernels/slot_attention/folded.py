"""Slot Attention for inference: everything a checkpoint fixes is multiplied out beforehand.

Write ``z(x) = (x - mean) * rstd`` for LayerNorm without its affine part and ``g, b`` for that part.
With ``x`` the encoded tokens and ``s`` the slots, these hold exactly (tests prove it in float64):

* ``query . key = z(s) A . z(x) + c . z(s) + r(x)``, where ``A`` contains ``Wq``, ``Wk``, the scale and
  both norms' gains. ``c . z(s)``, from the bias of the tokens' norm, is one number per slot; the softmax
  is over slots, so it does *not* cancel.
  ``r(x)``, everything the bias of the *slots'* norm contributes, is the same for all slots and does.
* Weights that meet ``z(s)`` are centred: their rows sum to zero, so ``W z(s) = rstd * (W s)`` and a kernel
  that reads ``s`` needs no mean.
* ``W_ih (w v) = (W_ih Wv g) (w z(x)) + (W_ih Wv b) * S/(S + eps)``, where ``w = attention / (S + eps)``
  and ``S`` is the slot's total attention: the weights sum to ``S/(S + eps)``, not to one.
* The update, GRU and MLP of the last iteration touch nothing that selection reads, and the first
  iteration's queries and hidden gates depend on the checkpoint and the noise alone.

Floor per image at (N, K) = (576, 64), official widths: 4.72 GFLOP (the official dataflow spends
5.96), of which the encoder MLP is 3.62; 28 MB of float32 weights and 2.4 MB of features are read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ocvtp_kernels._alike import image_by_image, laid_out
from ocvtp_kernels._transforms import is_traced
from ocvtp_kernels.slot_attention.reference import SlotAttentionWeights, gru_gates, layer_norm


class FoldedWeights(NamedTuple):
    """A checkpoint multiplied out for inference; made by :func:`fold`. Same letters as the weights."""

    encoder_fc1_weight: torch.Tensor  # [H, C], the norm's gain inside
    encoder_fc1_bias: torch.Tensor  # [H], the norm's bias inside
    encoder_fc2_weight: torch.Tensor  # [D, H]
    encoder_fc2_bias: torch.Tensor  # [D]
    query_weight: torch.Tensor  # [D, D]: Wq, Wk, scale, both gains; rows sum to zero
    query_bias_weight: torch.Tensor  # [D], makes the slot's own bias; sums to zero
    gru_input_weight: torch.Tensor  # [3D, D], Wv and the token norm's gain inside
    gru_input_bias: torch.Tensor  # [3D]
    gru_mass_bias: torch.Tensor  # [3D], multiplied by S / (S + eps)
    gru_hidden_weight: torch.Tensor  # [3D, D]
    gru_hidden_bias: torch.Tensor  # [3D]
    mlp_fc1_weight: torch.Tensor  # [M, D], the norm's gain inside; rows sum to zero
    mlp_fc1_bias: torch.Tensor  # [M], the norm's bias inside
    mlp_fc2_weight: torch.Tensor  # [D, M]
    mlp_fc2_bias: torch.Tensor  # [D]


class SlotStart(NamedTuple):
    """What the first iteration needs of the initial slots; constant while noise and checkpoint are."""

    slots: torch.Tensor  # [B or 1, K, D]
    queries: torch.Tensor  # [B or 1, K, D], in the dtype of the matrices
    query_bias: torch.Tensor  # [B or 1, K]
    gates_hidden: torch.Tensor  # [B or 1, K, 3D]


@torch.no_grad()
def fold(weights: SlotAttentionWeights, dtype: torch.dtype = torch.float32) -> FoldedWeights:
    """Multiply a checkpoint out, in float64, and round the result once.

    Args:
        weights: of the checkpoint.
        dtype: of the matrices. Vectors are in this dtype too, but never less than float32.

    Raises:
        ValueError: a folded weight is too large for ``dtype``, or nothing computes in it.
    """
    if dtype not in (torch.float64, torch.float32, torch.float16):
        raise ValueError(f"dtype must be float64, float32 or float16; got {dtype}")
    device = weights.query_weight.device
    exact = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
    w = SlotAttentionWeights(*(laid_out(tensor.detach().to(exact), torch.float64) for tensor in weights))
    query_key = w.query_weight.T @ w.key_weight * w.query_weight.shape[0] ** -0.5  # [slot side, token side]
    value_gates = w.gru_input_weight @ w.value_weight
    folded = FoldedWeights(
        encoder_fc1_weight=w.encoder_fc1_weight * w.encoder_norm_weight,
        encoder_fc1_bias=w.encoder_fc1_bias + w.encoder_fc1_weight @ w.encoder_norm_bias,
        encoder_fc2_weight=w.encoder_fc2_weight,
        encoder_fc2_bias=w.encoder_fc2_bias,
        query_weight=_centred((w.slot_norm_weight[:, None] * query_key * w.input_norm_weight).T),
        query_bias_weight=_centred(w.slot_norm_weight * (query_key @ w.input_norm_bias)),
        gru_input_weight=value_gates * w.input_norm_weight,
        gru_input_bias=w.gru_input_bias,
        gru_mass_bias=value_gates @ w.input_norm_bias,
        gru_hidden_weight=w.gru_hidden_weight,
        gru_hidden_bias=w.gru_hidden_bias,
        mlp_fc1_weight=_centred(w.mlp_fc1_weight * w.mlp_norm_weight),
        mlp_fc1_bias=w.mlp_fc1_bias + w.mlp_fc1_weight @ w.mlp_norm_bias,
        mlp_fc2_weight=w.mlp_fc2_weight,
        mlp_fc2_bias=w.mlp_fc2_bias,
    )
    vectors = torch.promote_types(dtype, torch.float32)
    rounded = FoldedWeights(
        *(t.to(device, vectors if t.ndim == 1 else dtype, copy=True).contiguous() for t in folded)
    )
    # Compiled code, and tensors without values, can't look.
    looks = dtype == torch.float16 and device.type != "meta" and not torch.compiler.is_compiling()
    looks = looks and not is_traced(rounded.query_weight)
    if looks and not all(bool(tensor.isfinite().all()) for tensor in rounded):
        raise ValueError('a weight of this checkpoint is too large for float16; use precision="fp32"')
    return rounded


def start_from_slots(slots: torch.Tensor, w: FoldedWeights) -> SlotStart:
    """First-iteration constants of ``slots`` ``[B or 1, K, D]``, in at least float32.

    Image by image: the kernels' bits depend neither on the batch nor on strides, so these may not either,
    but for compiled code.
    """
    exact = w.mlp_fc2_bias.dtype
    query, hidden = w.query_weight.to(exact), w.gru_hidden_weight.to(exact)

    def start(slots: torch.Tensor) -> SlotStart:
        normed = layer_norm(slots)
        return SlotStart(
            slots,
            F.linear(normed, query).to(w.query_weight.dtype),
            normed @ w.query_bias_weight,
            F.linear(slots, hidden, w.gru_hidden_bias),
        )

    slots = laid_out(slots, exact)
    if torch.compiler.is_compiling():  # one graph for any number of images
        return start(slots)
    return SlotStart(*image_by_image(start, slots))


def normalise(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What :func:`slot_assignment` does first, ``[B, N, C]``: in at least float32, and then in ``dtype``."""
    return layer_norm(features.to(torch.promote_types(features.dtype, torch.float32))).to(dtype)


def slot_assignment(
    features: torch.Tensor,
    start: SlotStart,
    w: FoldedWeights,
    num_iters: int,
    eps: float,
    normalised: bool = False,
) -> torch.Tensor:
    """``features`` ``[B, N, C]``, or what :func:`normalise` makes of them -> the last iteration's attention
    ``[B, K, N]``."""
    normed = features if normalised else layer_norm(features)
    hidden = F.gelu(F.linear(normed, w.encoder_fc1_weight, w.encoder_fc1_bias))
    tokens = layer_norm(F.linear(hidden, w.encoder_fc2_weight, w.encoder_fc2_bias))
    batch = tokens.shape[0]
    slots, queries, bias, gates_hidden = (tensor.expand(batch, *[-1] * (tensor.ndim - 1)) for tensor in start)
    for iteration in range(num_iters - 1):
        if iteration > 0:
            queries, bias = _queries(slots, w)
            gates_hidden = F.linear(slots, w.gru_hidden_weight, w.gru_hidden_bias)
        slots = _update(_attend(queries, bias, tokens), tokens, slots, gates_hidden, w, eps)
    if num_iters > 1:
        queries, bias = _queries(slots, w)
    return _attend(queries, bias, tokens)


def top_tokens(attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys ``[B, 1, K]``, largest attention and finiteness ``[B, N]`` of ``[B, K, N]``."""
    best, top = attention.float().max(dim=2)  # ties: the lowest token
    top = attention.argmax(dim=2) if attention.dtype == torch.float64 else top
    # Attention is not negative, and floats that are not negative order like their bits.
    score = best.contiguous().view(torch.int32).long()
    keys = (score << 32) | (0x7FFFFFFF - top)
    return keys[:, None], attention.amax(dim=1).float(), attention.isfinite().all(dim=1)


def _centred(weight: torch.Tensor) -> torch.Tensor:
    """Without its mean over the last axis, which a normalised input does not see."""
    return weight - weight.mean(dim=-1, keepdim=True)


def _queries(slots: torch.Tensor, w: FoldedWeights) -> tuple[torch.Tensor, torch.Tensor]:
    normed = layer_norm(slots)
    return F.linear(normed, w.query_weight), normed @ w.query_bias_weight


def _attend(queries: torch.Tensor, bias: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax over slots of ``queries`` ``[B, K, D]``, with a bias each, against ``tokens`` ``[B, N, D]``."""
    logits = torch.baddbmm(bias[:, :, None], queries, tokens.transpose(1, 2))
    return logits.softmax(dim=1)


def _update(
    attention: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    gates_hidden: torch.Tensor,
    w: FoldedWeights,
    eps: float,
) -> torch.Tensor:
    """One slot update, ``[B, K, D] -> [B, K, D]``: weighted mean, GRU, residual MLP."""
    mass = attention.sum(dim=2, keepdim=True)
    mean = attention @ tokens / (mass + eps)
    gates_in = F.linear(mean, w.gru_input_weight, w.gru_input_bias) + mass / (mass + eps) * w.gru_mass_bias
    slots = gru_gates(gates_in, gates_hidden, slots)
    hidden = F.gelu(F.linear(layer_norm(slots), w.mlp_fc1_weight, w.mlp_fc1_bias))
    return slots + F.linear(hidden, w.mlp_fc2_weight, w.mlp_fc2_bias)
