# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""The step of Slot Attention that meets every token, forward and backward, as Triton kernels.

Write A for the attention ``[K, N]`` of an image, S_k for the sum of a slot's, P = A / (S + eps) and
U = P v. Forward is the inference path's ``attend`` and ``update``. Backward computes A again, a tile of
tokens at a time. For a gradient dU of the means, and E of the map if somebody wants one,

    dA = (dU v^T - dU . U) / (S + eps) + E         dU . U: a slot's row with its row, a number per slot
    dL = A (dA - sum over slots of A dA)           of the logits; a token needs no other token

so one pass does it, and no sum over tokens is left but those of the products dq = dL k, dk = dL^T q,
dv = P^T dU. These are PyTorch's, from dL and P in scratch memory that lives as long as the call.

No atomics; tiles are cut from each image's first token, so dL, P and all of forward have the same bits
whatever the batch. A library's batched product need not.

Floor of backward at (B, N, K, D) = (12, 2880, 640, 512), bfloat16, H100 (790 TFLOP/s, 3.35 TB/s): five
products, 113 GFLOP, 143 us; slots in chunks cost two products more, 57 us.
"""

import torch
import triton
import triton.language as tl

from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import tile
from ocvtp_kernels.slot_attention.cut import Cut, arithmetic, padded_slots
from ocvtp_kernels.slot_attention.steps import block, exponential, logits, product
from ocvtp_kernels.slot_attention.triton import attention_weights, weighted_mean

# Elements of dL, and of P, in memory at a time: 134 MB each in float32.
_MOST_SCRATCH = 1 << 25
# Slots that one tile can hold beside their gradients.
_SLOT_CLASSES = (64, 128)


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def _map_gradient(
    v_ptr, g_ptr, rows_ptr, map_ptr, n, k, N, K, D, R,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of attention ``[tokens, slots]``; zero where there is no slot."""
    gain = tl.load(rows_ptr + k, mask=k < K, other=0.0)
    offset = tl.load(rows_ptr + R + k, mask=k < K, other=0.0)
    grad = product(v_ptr, g_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
    grad = grad * gain[None, :] - offset[None, :]
    if MAP:
        inside = (n < N)[:, None] & (k < K)[None, :]
        offsets = k.to(tl.int64)[None, :] * N + n[:, None]
        grad += tl.load(map_ptr + offsets, mask=inside, other=0.0)
    return grad


@triton.jit
def _store(p, grad, mean, rows_ptr, dl_ptr, p_ptr, n, k, N, K, KS, R):
    """A tile of dL and of P, from attention ``p``, its gradient, and each token's mean of that."""
    inverse = tl.load(rows_ptr + 2 * R + k, mask=k < K, other=0.0)
    offsets = n.to(tl.int64)[:, None] * KS + k[None, :]
    inside = (n < N)[:, None] & (k < KS)[None, :]
    dl = p * (grad - mean[:, None])
    tl.store(dl_ptr + offsets, dl.to(dl_ptr.dtype.element_ty), mask=inside)
    tl.store(p_ptr + offsets, (p * inverse[None, :]).to(p_ptr.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["R"])
def prepare(
    du_ptr, u_ptr, sums_ptr, g_ptr, rows_ptr, R, D, eps,
    BR: tl.constexpr, BC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles): from ``dU`` and ``U`` ``[R, D]`` and ``S`` ``[R]``, float32, what a slot's tokens
    need: ``g``, dU as an operand, and ``rows`` ``[3, R]`` float32: by what its products are multiplied, what
    is taken off then, and 1 / (S + eps).

    SCALED: each row of ``g`` is divided by its own power of two, so that its largest is between 1 and 2 and
    float16, which has few exponents, keeps all that its digits can hold.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    factor = tl.full([BR], 1.0, tl.float32)
    if SCALED:
        largest = tl.zeros([BR], tl.float32)
        for start in tl.range(0, D, BC):
            c = start + tl.arange(0, BC)
            largest = tl.maximum(largest, tl.max(tl.abs(block(du_ptr, r, c, R, D, D)), axis=1))
        # Its exponent, between -100 and 100, and no digits.
        power = largest.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.minimum(tl.maximum(power, 27 << 23), 227 << 23)
        factor = power.to(tl.float32, bitcast=True)
        shrink = ((254 << 23) - power).to(tl.float32, bitcast=True)
    total = tl.zeros([BR], tl.float32)
    for start in tl.range(0, D, BC):
        c = start + tl.arange(0, BC)
        g = block(du_ptr, r, c, R, D, D)
        if SCALED:
            g = g * shrink[:, None]
        g = g.to(g_ptr.dtype.element_ty)
        offsets = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(g_ptr + offsets, g, mask=(r < R)[:, None] & (c < D)[None, :])
        # As rounded: a token that equals the mean then gets exactly nothing.
        total += tl.sum(g.to(tl.float32) * block(u_ptr, r, c, R, D, D), axis=1)
    inverse = 1.0 / (tl.load(sums_ptr + r, mask=r < R, other=0.0) + eps)
    gain = inverse * factor
    tl.store(rows_ptr + r, gain, mask=r < R)
    tl.store(rows_ptr + R + r, gain * total, mask=r < R)
    tl.store(rows_ptr + 2 * R + r, inverse, mask=r < R)


@triton.jit(do_not_specialize=["N", "K", "R"])
def attend_backward(
    z_ptr, v_ptr, q_ptr, g_ptr, bias_ptr, rows_ptr, map_ptr, dl_ptr, p_ptr, N, K, KS, D, R,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): ``dL`` and ``P`` ``[B, N, KS]``, from keys ``z`` and values ``v`` ``[B, N, D]``,
    queries ``q`` and ``g`` ``[B, K, D]``, ``rows`` ``[3, R]``, and, with MAP, a gradient of the attention
    ``[B, K, N]``.

    ONE: the tile holds all slots. Otherwise a pass for each token's sums and a pass that computes all again.
    """
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    z_ptr += image * N * D
    v_ptr += image * N * D
    q_ptr += image * K * D
    g_ptr += image * K * D
    rows_ptr += image * K
    map_ptr += image * K * N
    dl_ptr += image * N * KS
    p_ptr += image * N * KS
    if ONE:
        k = tl.arange(0, BK)
        p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
        p = exponential(p - tl.max(p, axis=1)[:, None])
        p = p * (1.0 / tl.sum(p, axis=1))[:, None]
        grad = _map_gradient(
            v_ptr, g_ptr, rows_ptr, map_ptr, n, k, N, K, D, R, BM, BK, BC, EVEN, MAP, PRECISION
        )  # fmt: skip
        mean = tl.sum(p * grad, axis=1)
        _store(p, grad, mean, rows_ptr, dl_ptr, p_ptr, n, k, N, K, KS, R)
    else:
        highest = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        mean = tl.zeros([BM], tl.float32)
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
            higher = tl.maximum(highest, tl.max(p, axis=1))
            shrink = exponential(highest - higher)
            p = exponential(p - higher[:, None])
            grad = _map_gradient(
                v_ptr, g_ptr, rows_ptr, map_ptr, n, k, N, K, D, R, BM, BK, BC, EVEN, MAP, PRECISION
            )  # fmt: skip
            total = total * shrink + tl.sum(p, axis=1)
            mean = mean * shrink + tl.sum(p * grad, axis=1)
            highest = higher
        mean = mean / total
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
            p = exponential(p - highest[:, None]) * (1.0 / total)[:, None]
            grad = _map_gradient(
                v_ptr, g_ptr, rows_ptr, map_ptr, n, k, N, K, D, R, BM, BK, BC, EVEN, MAP, PRECISION
            )  # fmt: skip
            _store(p, grad, mean, rows_ptr, dl_ptr, p_ptr, n, k, N, K, KS, R)


# ------------------------------------------------------------------------------------------------- launchers


def slot_update(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, eps: float, return_attention: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted means ``[B, K, D]``, sums of attention ``[B, K]``, and attention ``[B, K, N]`` or nothing."""
    queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    cut = arithmetic(queries.device, queries.dtype, False)
    batch, slots, width = queries.shape
    tokens = keys.shape[1]
    bias = torch.zeros(batch, slots, dtype=torch.float32, device=cut.device)
    p, sums = attention_weights(keys, queries, bias, cut)
    mean = torch.empty(batch, slots, width, dtype=torch.float32, device=cut.device)
    mass = torch.empty(batch, slots, dtype=torch.float32, device=cut.device)
    weighted_mean(p, sums, values, mean, mass, eps, cut, SHARE=False)
    if not return_attention:
        return mean, mass, torch.empty(0, dtype=torch.float32, device=cut.device)
    if cut.dtype != torch.float32:
        p, _ = attention_weights(keys, queries, bias, cut, plain=True)
    attention = torch.empty(batch, slots, tokens, dtype=torch.float32, device=cut.device)
    return mean, mass, attention.copy_(p[:, :, :slots].transpose(1, 2))


def slot_update_backward(
    grad: torch.Tensor,
    grad_map: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor,
    mass: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values. ``grad``, ``mean`` and ``mass`` are float32."""
    grad, queries, keys, values = (t.contiguous() for t in (grad, queries, keys, values))
    batch, slots, width = queries.shape
    tokens = keys.shape[1]
    dtype, device = queries.dtype, queries.device
    d_queries = torch.empty(batch, slots, width, dtype=dtype, device=device)
    d_keys = torch.empty(batch, tokens, width, dtype=dtype, device=device)
    d_values = torch.empty(batch, tokens, width, dtype=dtype, device=device)
    step = max(1, _MOST_SCRATCH // (tokens * padded_slots(slots)))
    for first in range(0, batch, step):
        images = slice(first, first + step)
        q, k, du = queries[images], keys[images], grad[images]
        e = None if grad_map is None else grad_map[images].to(torch.float32).contiguous()
        dl, p, g = map_gradients(du, e, q, k, values[images], mean[images], mass[images], eps)
        dl, p = dl[:, :, :slots], p[:, :, :slots]
        _multiply(dl.transpose(1, 2), k, d_queries[images])
        _multiply(dl, q, d_keys[images])
        _multiply(p, g if dl.dtype == dtype else du, d_values[images])
    return d_queries, d_keys, d_values


def map_gradients(
    grad: torch.Tensor,
    grad_map: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor,
    mass: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dL`` and ``P`` ``[B, N, K padded]``, and ``grad`` as an operand, ``[B, K, D]``; all contiguous.

    dL and P are float32 where products are in float16: gradients may have any exponent, and so has P where
    a slot owns little.
    """
    batch, slots, width = queries.shape
    tokens, padded = keys.shape[1], padded_slots(slots)
    cut = arithmetic(queries.device, queries.dtype, False)
    g = torch.empty(batch, slots, width, dtype=cut.dtype, device=cut.device)
    rows = torch.empty(3, batch * slots, dtype=torch.float32, device=cut.device)
    size = tile("slot_training.prepare", cut.arch, "any")
    launch(
        prepare, (triton.cdiv(batch * slots, size["BR"]),), cut.device,
        grad, mean, mass, g, rows, batch * slots, width, eps, SCALED=cut.dtype == torch.float16, **size,
    )  # fmt: skip
    bias = torch.zeros(slots, dtype=torch.float32, device=cut.device)
    scratch = torch.bfloat16 if cut.dtype == torch.bfloat16 else torch.float32
    dl = torch.empty(batch, tokens, padded, dtype=scratch, device=cut.device)
    p = torch.empty(batch, tokens, padded, dtype=scratch, device=cut.device)
    size = _backward_tile(cut, slots)
    launch(
        attend_backward, (triton.cdiv(tokens, size["BM"]), batch), cut.device,
        keys, values, queries, g, bias, rows, keys if grad_map is None else grad_map, dl, p,
        tokens, slots, padded, width, batch * slots,
        EVEN=width % size["BC"] == 0, ONE=slots <= size["BK"], MAP=grad_map is not None,
        PRECISION=cut.precision, **size,
    )  # fmt: skip
    return dl, p, g


def _backward_tile(cut: Cut, slots: int) -> dict[str, int]:
    role = next((f"K<={most}" for most in _SLOT_CLASSES if slots <= most), "any K")
    return dict(tile("slot_training.attend_backward", cut.arch, f"{role}-{cut.bits}"))


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a b``, image by image, in the dtype of ``a``."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b.to(a.dtype)))
