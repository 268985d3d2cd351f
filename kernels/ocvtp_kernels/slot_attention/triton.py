# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Slot Attention for inference as Triton kernels, on the weights of ``folded.py``.

Of ``num_iters`` iterations the last computes its attention alone. One call is, for T = num_iters - 1,

    normalise, linear (GELU), linear, normalise        features -> tokens z, once
    attend, update, gru, linear (GELU), linear, linear slots -> slots and their queries, T times
    attend                                             the assignment

so 5 + 6T launches: 17 for three iterations, and 4 more for every further 65536 rows of tokens. The softmax
is over slots: token tiles are independent and nothing is rescaled. No atomics. Tiles are cut from each
image's first token, sums run in their order, and a row of a product does not depend on the rows beside it,
so an image's bits do not depend on the batch.

Floor at (B, N, K) = (64, 576, 64), official widths, 16 bit, H100 (790 TFLOP/s, 3.35 TB/s): 302 GFLOP, 382 us;
stage by stage, each at its own limit, 453 us. At B=1 it is latency: 4.7 GFLOP are 6 us, 17 launches of a
CUDA graph about 2.6 us each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._jit import ordered_bits
from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import tile
from ocvtp_kernels.slot_attention.folded import FoldedWeights, SlotStart
from ocvtp_kernels.slot_attention.reference import NORM_EPS
from ocvtp_kernels.slot_attention.shapes import Assigned, TopTokens, slot_class, token_tiles

_LOG2E = tl.constexpr(1.4426950408889634)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
# Attention in float16 is stored times 2^12, which is exact: a starved slot's sum of 2e-6 then keeps an error
# of 4e-4, and all of it would underflow otherwise.
_SCALE = 4096.0
# Rows of the encoder's hidden layer in memory at a time: 268 MB at 2048 columns of 16 bit.
_MOST_ROWS = 65536
_ALIGNED = 16  # elements; rows of the attention are padded to it, so that they load in 16-byte pieces


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def _gelu(x, FAST: tl.constexpr):
    """Exact (erf) GELU. FAST: to 7e-7, Abramowitz and Stegun 7.1.26, in 18 instructions instead of 32."""
    if FAST:
        y = tl.abs(x) * _ROOT_HALF
        root = tl.rsqrt(1.0 + 0.3275911 * y)
        t = root * root
        series = t * (
            0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        )
        erf = 1.0 - series * tl.exp2(0.0 - y * y * _LOG2E)
        return 0.5 * x + 0.5 * tl.abs(x) * erf
    return 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))


@triton.jit
def exponential(x):
    """Of differences, after which the factor rounds least."""
    # Nothing is added to a product on the way to a logit and from it to here, so no compiler can fuse one:
    # kernels for the map and for the top tokens compute the same bits.
    return tl.exp2(x * _LOG2E)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def block(ptr, row, column, rows, columns, stride):
    """``[rows of row, columns of column]`` of a matrix whose rows are ``stride`` apart; zeros outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def product(
    z_ptr, q_ptr, n, k, N, K, D,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``z q^T`` ``[tokens, slots]``; zero where there is none. Tokens on the rows: ``wgmma`` wants 64 of
    them, and slots may be few."""
    total = tl.zeros([BM, BK], tl.float32)
    for start in tl.range(0, D, BC):
        c = start + tl.arange(0, BC)
        z = block(z_ptr, n, c, N, D, D)
        q = block(q_ptr, k, c, K, D, D)
        total = tl.dot(z, tl.trans(q), total, input_precision=PRECISION)
    return total


@triton.jit
def logits(
    z_ptr, q_ptr, bias_ptr, n, k, N, K, D,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits ``[tokens, slots]``; -inf where there is no slot."""
    total = product(z_ptr, q_ptr, n, k, N, K, D, BM, BK, BC, PRECISION)
    bias = tl.load(bias_ptr + k, mask=k < K, other=float("-inf"))
    return total + bias[None, :]


@triton.jit
def _emit(
    p, p_ptr, sums_ptr, keys_ptr, part, n, k, N, K, KS,
    BM: tl.constexpr, LAST: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Store a tile of attention ``p`` ``[tokens, slots]`` as weights with their sums, or, from the last
    iteration, as every slot's best token of the tile; each token's largest attention of the tile's slots."""
    if LAST:
        p = tl.where((n < N)[:, None], p, -1.0)
        best, top = tl.max(p, axis=0, return_indices=True)  # ties go to the lowest token
        score = ordered_bits(best).to(tl.int64) - 0x80000000  # signed, as the key is
        key = (score << 32) | (0x7FFFFFFF - part * BM - top).to(tl.int64)
        tl.store(keys_ptr + part.to(tl.int64) * K + k, key, mask=k < K)
    else:
        p = tl.where((n < N)[:, None], p, 0.0)
        tl.store(sums_ptr + part.to(tl.int64) * KS + k, tl.sum(p, axis=0), mask=k < KS)
        offsets = n.to(tl.int64)[:, None] * KS + k[None, :]
        inside = (n < N)[:, None] & (k < KS)[None, :]
        tl.store(p_ptr + offsets, (p * SCALE).to(p_ptr.dtype.element_ty), mask=inside)
    return tl.max(p, axis=1)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N"])
def normalise(x_ptr, y_ptr, x_b, N, C, eps, BR: tl.constexpr, CP: tl.constexpr):
    """Grid (row tiles, B): LayerNorm without affine part of ``[B, N, C]``, rows one after another."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, CP)
    inside = (n < N)[:, None] & (c < C)[None, :]
    offsets = n.to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + image * x_b + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    y = (x * rstd[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (image * N + n)[:, None] * C + c[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["R"])
def linear(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, column_w_ptr, column_ptr, R, OUT, IN, eps,
    BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, COLUMN: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles): ``x`` ``[R, IN]`` -> ``x W^T + bias``, then GELU, then the residual added, ``[R, OUT]``.

    NORM: ``x`` is normalised first; ``W`` is centred, so only the variance is needed, which is gathered from
    the blocks as they pass (merged mean by mean, so that a large mean costs no digits). COLUMN: no bias, but
    one more output column, a dot product with ``column_w`` in float32.
    """
    # GROUP row tiles go through all columns together, so that their rows and the weights stay in L2.
    tiles = tl.cdiv(OUT, BO)
    program = tl.program_id(0)
    group = program // (GROUP * tiles)
    size = tl.minimum(tl.cdiv(R, BM) - group * GROUP, GROUP)
    inner = program - group * GROUP * tiles
    r = (group * GROUP + inner % size) * BM + tl.arange(0, BM)
    o = (inner // size) * BO + tl.arange(0, BO)
    total = tl.zeros([BM, BO], tl.float32)
    if NORM:
        mean = tl.zeros([BM], tl.float32)
        squares = tl.zeros([BM], tl.float32)
    if COLUMN:
        column = tl.zeros([BM], tl.float32)
    for start in tl.range(0, IN, BC):
        i = start + tl.arange(0, BC)
        x = block(x_ptr, r, i, R, IN, IN)
        w = block(w_ptr, o, i, OUT, IN, IN)
        total = tl.dot(x.to(w.dtype), tl.trans(w), total, input_precision=PRECISION)
        if NORM:
            width = tl.minimum(IN - start, BC).to(tl.float32)
            before = start * 1.0
            own = tl.sum(x, axis=1) / width
            away = tl.where((i < IN)[None, :], x - own[:, None], 0.0)
            delta = own - mean
            share = width / (before + width)
            mean += delta * share
            squares += tl.sum(away * away, axis=1) + delta * delta * before * share
        if COLUMN:
            extra = tl.load(column_w_ptr + i, mask=i < IN, other=0.0)
            column += tl.sum(x * extra[None, :], axis=1)
    if NORM:
        rstd = tl.rsqrt(squares / IN + eps)
        total = total * rstd[:, None]
    if COLUMN:
        if inner // size == 0:
            tl.store(column_ptr + r, column * rstd, mask=r < R)
    else:
        total += tl.load(bias_ptr + o, mask=o < OUT, other=0.0)[None, :]
    if GELU:
        total = _gelu(total, FAST)
    if RESIDUAL:
        total += block(residual_ptr, r, o, R, OUT, OUT)
    offsets = r.to(tl.int64)[:, None] * OUT + o[None, :]
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=(r < R)[:, None] & (o < OUT)[None, :])


@triton.jit(do_not_specialize=["N", "K"])
def attend(
    z_ptr, q_ptr, bias_ptr, p_ptr, sums_ptr, keys_ptr, largest_ptr, finite_ptr,
    q_b, bias_b, N, K, KS, D,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, ONE: tl.constexpr, LAST: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): softmax over slots of ``queries . z + bias``.

    ONE: the tile holds all slots. Otherwise a pass for the sum and a pass that computes the logits again.
    Not LAST: ``p`` ``[B, N, KS]`` times SCALE, zero from slot K on, and each tile's sums of it,
    ``[B, tiles, KS]``. LAST: ``keys`` ``[B, tiles, K]``, integers that order like (attention, lower token),
    each token's ``largest`` attention ``[B, N]``, and whether it is ``finite`` ``[B, N]``.
    """
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    n = part * BM + tl.arange(0, BM)
    z_ptr += image * N * D
    q_ptr += image * q_b
    bias_ptr += image * bias_b
    p_ptr += image * N * KS
    sums_ptr += image * parts * KS
    keys_ptr += image * parts * K
    if ONE:
        k = tl.arange(0, BK)
        p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, PRECISION)
        p = exponential(p - tl.max(p, axis=1)[:, None])
        total = tl.sum(p, axis=1)
        p = p * (1.0 / total)[:, None]
        largest = _emit(
            p, p_ptr, sums_ptr, keys_ptr, part, n, k, N, K, KS, BM, LAST, SCALE
        )  # fmt: skip
    else:
        highest = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, PRECISION)
            higher = tl.maximum(highest, tl.max(p, axis=1))
            total = total * exponential(highest - higher) + tl.sum(exponential(p - higher[:, None]), axis=1)
            highest = higher
        largest = tl.full([BM], -1.0, tl.float32)
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, PRECISION)
            p = exponential(p - highest[:, None]) * (1.0 / total)[:, None]
            some = _emit(
                p, p_ptr, sums_ptr, keys_ptr, part, n, k, N, K, KS, BM, LAST, SCALE
            )  # fmt: skip
            largest = tl.maximum(largest, some)
    if LAST:
        tl.store(largest_ptr + image * N + n, largest, mask=n < N)
        # NaN is less than nothing. Token by token: Triton 3.6 can't reduce it further for sm_100.
        tl.store(finite_ptr + image * N + n, (total < float("inf")).to(tl.uint8), mask=n < N)


@triton.jit(do_not_specialize=["N", "K", "T"])
def update(
    p_ptr, sums_ptr, z_ptr, u_ptr, mass_ptr, N, K, KS, D, T, eps,
    BK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SHARE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles, slot tiles, B): each slot's weighted mean of the tokens, ``u`` ``[B, K, D]``, and
    its ``mass`` ``[B, K]``: the sum S of its attention, or, with SHARE, S / (S + eps). Tokens are added in
    their order."""
    image = tl.program_id(2).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    p_ptr += image * N * KS
    z_ptr += image * N * D
    total = tl.zeros([BK, BD], tl.float32)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        p = block(p_ptr, n, k, N, KS, KS)
        z = block(z_ptr, n, d, N, D, D)
        total = tl.dot(tl.trans(p), z, total, input_precision=PRECISION)
    mass = tl.zeros([BK], tl.float32)
    for start in tl.range(0, T, 8):
        t = start + tl.arange(0, 8)
        mass += tl.sum(block(sums_ptr + image * T * KS, t, k, T, KS, KS), axis=0)
    u = total * (1.0 / ((mass + eps) * SCALE))[:, None]
    offsets = (image * K + k)[:, None] * D + d[None, :]
    inside = (k < K)[:, None] & (d < D)[None, :]
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        if SHARE:
            mass = mass / (mass + eps)
        tl.store(mass_ptr + image * K + k, mass, mask=k < K)


@triton.jit(do_not_specialize=["R", "START"])
def gru(
    u_ptr, mass_ptr, s_ptr, gates_ptr, wi_ptr, wh_ptr, bi_ptr, bm_ptr, bh_ptr, y_ptr, R, START, D,
    BM: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column tiles): one GRU cell, ``u`` and slots ``s`` ``[R, D]`` -> new slots, float32.

    GIVEN: the hidden side of the gates is a constant, ``[START, 3D]``, and so are the slots, ``[START, D]``;
    row r takes row r mod START of them. ``bm`` is the part of the input bias that goes with the mass.
    """
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    reset = tl.zeros([BM, BJ], tl.float32)
    keep = tl.zeros([BM, BJ], tl.float32)
    new = tl.zeros([BM, BJ], tl.float32)
    hidden = tl.zeros([BM, BJ], tl.float32)
    for start in tl.range(0, D, BC):
        c = start + tl.arange(0, BC)
        u = block(u_ptr, r, c, R, D, D)
        reset = tl.dot(u, tl.trans(block(wi_ptr, j, c, D, D, D)), reset, input_precision=PRECISION)
        w = block(wi_ptr + D * D, j, c, D, D, D)
        keep = tl.dot(u, tl.trans(w), keep, input_precision=PRECISION)
        w = block(wi_ptr + 2 * D * D, j, c, D, D, D)
        new = tl.dot(u, tl.trans(w), new, input_precision=PRECISION)
        if not GIVEN:
            s = block(s_ptr, r, c, R, D, D).to(u.dtype)
            reset = tl.dot(s, tl.trans(block(wh_ptr, j, c, D, D, D)), reset, input_precision=PRECISION)
            w = block(wh_ptr + D * D, j, c, D, D, D)
            keep = tl.dot(s, tl.trans(w), keep, input_precision=PRECISION)
            w = block(wh_ptr + 2 * D * D, j, c, D, D, D)
            hidden = tl.dot(s, tl.trans(w), hidden, input_precision=PRECISION)
    real = j < D
    mass = tl.load(mass_ptr + r, mask=r < R, other=0.0)[:, None]
    reset += mass * tl.load(bm_ptr + j, mask=real, other=0.0)[None, :] + tl.load(
        bi_ptr + j, mask=real, other=0.0
    )
    keep += mass * tl.load(bm_ptr + D + j, mask=real, other=0.0)[None, :] + tl.load(
        bi_ptr + D + j, mask=real, other=0.0
    )
    new += mass * tl.load(bm_ptr + 2 * D + j, mask=real, other=0.0)[None, :] + tl.load(
        bi_ptr + 2 * D + j, mask=real, other=0.0
    )
    row = r % START
    if GIVEN:
        reset += block(gates_ptr, row, j, START, D, 3 * D)
        keep += block(gates_ptr + D, row, j, START, D, 3 * D)
        hidden = block(gates_ptr + 2 * D, row, j, START, D, 3 * D)
    else:
        reset += tl.load(bh_ptr + j, mask=real, other=0.0)[None, :]
        keep += tl.load(bh_ptr + D + j, mask=real, other=0.0)[None, :]
        hidden += tl.load(bh_ptr + 2 * D + j, mask=real, other=0.0)[None, :]
    new = _tanh(new + tl.sigmoid(reset) * hidden)
    old = block(s_ptr, row, j, START, D, D)
    y = new + tl.sigmoid(keep) * (old - new)
    tl.store(y_ptr + r.to(tl.int64)[:, None] * D + j[None, :], y, mask=(r < R)[:, None] & real[None, :])


# ------------------------------------------------------------------------------------------------- launchers


class Cut(NamedTuple):
    """Tiles and arithmetic of one call."""

    arch: str
    bits: str
    dtype: torch.dtype
    device: torch.device
    precision: str
    scale: float

    def of(self, kernel: str, role: str) -> dict[str, int]:
        """The tile of a kernel for this arithmetic."""
        return dict(tile(f"slot_attention.{kernel}", self.arch, f"{role}-{self.bits}"))


def assign(
    features: torch.Tensor,
    start: SlotStart,
    w: FoldedWeights,
    num_iters: int,
    eps: float,
    tf32: bool,
    return_attention: bool,
    *,
    normalised: bool = False,
    into: TopTokens | None = None,
) -> Assigned:
    """``features`` ``[B, N, C]`` -> every slot's best token of each tile, and what else is known by then.

    With ``normalised`` features are what :func:`normalise_into` left. ``into``: memory for the results.
    """
    cut = arithmetic(features.device, w.query_weight.dtype, tf32)
    start = SlotStart(*(tensor.contiguous() for tensor in start))
    w = FoldedWeights(*(tensor.contiguous() for tensor in w))
    z = _encode(features, w, cut, normalised)
    queries, bias = start.queries, start.query_bias
    slots = start.slots
    for iteration in range(num_iters - 1):
        weights, sums = attention_weights(z, queries, bias, cut)
        gates = start.gates_hidden if iteration == 0 else None
        slots = _update(weights, sums, z, slots, gates, w, eps, cut)
        queries, bias = _queries(slots, w, cut)
    return _assign(z, queries, bias, return_attention, cut, into)


def normalise_into(features: torch.Tensor, out: torch.Tensor) -> None:
    """What :func:`assign` does first: ``features`` ``[B, N, C]``, normalised, into ``out``, contiguous.

    Its dtype is that of the products.
    """
    _normalise(features, out, arithmetic(out.device, out.dtype, False))


def arithmetic(device: torch.device, dtype: torch.dtype, tf32: bool) -> Cut:
    """Of products in ``dtype`` on ``device``."""
    arch = architecture(device)
    assert arch is not None
    if dtype != torch.float32:
        # bfloat16 has the exponents of float32.
        return Cut(arch, "16bit", dtype, device, "ieee", _SCALE if dtype == torch.float16 else 1.0)
    # Three tf32 products are as good as float32, and on tensor cores; CDNA has float32 ones.
    precise = "ieee" if arch.startswith("gfx") else "tf32x3"
    return Cut(arch, "32bit", dtype, device, "tf32" if tf32 else precise, 1.0)


def _encode(features: torch.Tensor, w: FoldedWeights, cut: Cut, normalised: bool = False) -> torch.Tensor:
    """Normalised encoder MLP, ``[B, N, C] -> [B, N, D]``, in groups of images that bound the hidden layer."""
    batch, tokens, width = features.shape
    hidden_width, slot_width = w.encoder_fc1_weight.shape[0], w.encoder_fc2_weight.shape[0]
    z = torch.empty(batch, tokens, slot_width, dtype=cut.dtype, device=cut.device)
    step = max(1, _MOST_ROWS // tokens)
    for first in range(0, batch, step):
        group = features[first : first + step]
        rows = group.shape[0] * tokens
        x = group
        if not normalised:
            x = torch.empty(group.shape[0], tokens, width, dtype=cut.dtype, device=cut.device)
            _normalise(group, x, cut)
        hidden = torch.empty(rows, hidden_width, dtype=cut.dtype, device=cut.device)
        _linear("encode-1", x, w.encoder_fc1_weight, w.encoder_fc1_bias, hidden, cut, GELU=True)
        encoded = torch.empty(group.shape[0], tokens, slot_width, dtype=cut.dtype, device=cut.device)
        _linear("encode-2", hidden, w.encoder_fc2_weight, w.encoder_fc2_bias, encoded, cut)
        _normalise(encoded, z[first : first + step], cut)
    return z


def _normalise(x: torch.Tensor, y: torch.Tensor, cut: Cut) -> None:
    size = tile("slot_attention.normalise", cut.arch, "any")
    batch, tokens, width = x.shape
    # How loads are split over threads, and sums with them, must not depend on how the features lie in memory.
    if x.stride(2) != 1 or x.stride(1) != width:
        x = x.contiguous()
    padded = triton.next_power_of_2(width)
    rows = max(1, size["SIZE"] // padded)
    launch(
        normalise, (triton.cdiv(tokens, rows), batch), cut.device,
        x, y, x.stride(0), tokens, width, NORM_EPS,
        BR=rows, CP=padded, num_warps=size["num_warps"], num_stages=size["num_stages"],
    )  # fmt: skip


def _linear(
    role: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    cut: Cut,
    *,
    residual: torch.Tensor | None = None,
    column: tuple[torch.Tensor, torch.Tensor] | None = None,
    NORM: bool = False,
    GELU: bool = False,
) -> None:
    """``y = x W^T`` and what follows it; ``column`` is a weight and where its products go."""
    out, width = weight.shape
    rows = y.numel() // out
    size = cut.of("linear", role)
    grid = (triton.cdiv(rows, size["BM"]) * triton.cdiv(out, size["BO"]),)
    column_weight, column_out = (x, x) if column is None else column
    launch(
        linear, grid, cut.device,
        x, weight, x if bias is None else bias, x if residual is None else residual, y,
        column_weight, column_out, rows, out, width, NORM_EPS,
        NORM=NORM, GELU=GELU, RESIDUAL=residual is not None, COLUMN=column is not None,
        FAST=cut.dtype == torch.float16, PRECISION=cut.precision, **size,
    )  # fmt: skip


def padded_slots(slots: int) -> int:
    """Numbers in a row of attention."""
    return triton.cdiv(slots, _ALIGNED) * _ALIGNED


def attention_weights(
    z: torch.Tensor, queries: torch.Tensor, bias: torch.Tensor, cut: Cut, *, plain: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as weights ``[B, N, K padded]``, and each token tile's sums of them.

    The weights are in the dtype of the products and scaled; with ``plain`` they are not, and float32.
    """
    batch, tokens, _ = z.shape
    slots = queries.shape[1]
    padded = padded_slots(slots)
    size = cut.of("attend", slot_class(slots))
    tiles = triton.cdiv(tokens, size["BM"])
    p = torch.empty(batch, tokens, padded, dtype=torch.float32 if plain else cut.dtype, device=cut.device)
    sums = torch.empty(batch, tiles, padded, dtype=torch.float32, device=cut.device)
    _launch_attend(z, queries, bias, cut if not plain else cut._replace(scale=1.0), p=p, sums=sums)
    return p, sums


def _assign(
    z: torch.Tensor,
    queries: torch.Tensor,
    bias: torch.Tensor,
    return_attention: bool,
    cut: Cut,
    into: TopTokens | None = None,
) -> Assigned:
    """The last iteration."""
    batch, tokens, _ = z.shape
    slots = queries.shape[1]
    tiles = token_tiles(slots, tokens, cut.device, cut.dtype)
    attention = torch.empty(0, dtype=torch.float32, device=cut.device)
    if return_attention:  # to look at; not worth kernels of its own
        weights, _ = attention_weights(z, queries, bias, cut, plain=True)
        attention = weights[:, :, :slots].transpose(1, 2).contiguous()
    if into is None:
        into = TopTokens(
            keys=torch.empty(batch, tiles, slots, dtype=torch.int64, device=cut.device),
            largest=torch.empty(batch, tokens, dtype=torch.float32, device=cut.device),
            finite=torch.empty(batch, tokens, dtype=torch.uint8, device=cut.device).view(torch.bool),
        )
    found = Assigned(into.keys, into.largest, into.finite.view(torch.uint8), attention)
    _launch_attend(z, queries, bias, cut, found=found)
    return found._replace(finite=found.finite.view(torch.bool))


def _launch_attend(
    z: torch.Tensor,
    queries: torch.Tensor,
    bias: torch.Tensor,
    cut: Cut,
    *,
    p: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    found: Assigned | None = None,
) -> None:
    batch, tokens, width = z.shape
    slots = queries.shape[1]
    size = cut.of("attend", slot_class(slots))
    # What a variant does not write is not there; any tensor stands for it.
    results = (z, z, z) if found is None else (found.keys, found.largest, found.finite)
    launch(
        attend, (triton.cdiv(tokens, size["BM"]), batch), cut.device,
        z, queries, bias, z if p is None else p, z if sums is None else sums, *results,
        queries.stride(0) if queries.shape[0] > 1 else 0, bias.stride(0) if bias.shape[0] > 1 else 0,
        tokens, slots, padded_slots(slots), width,
        ONE=slots <= size["BK"], LAST=found is not None, SCALE=cut.scale, PRECISION=cut.precision, **size,
    )  # fmt: skip


def weighted_mean(
    p: torch.Tensor,
    sums: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    mass: torch.Tensor,
    eps: float,
    cut: Cut,
    *,
    SHARE: bool,
) -> None:
    """Fill ``mean`` ``[B, K, D]`` and ``mass`` ``[B, K]`` from what :func:`attention_weights` made."""
    batch, tokens, width = z.shape
    count = mean.shape[1]
    size = cut.of("update", "K<=64" if count <= 64 else "any K")
    launch(
        update, (triton.cdiv(width, size["BD"]), triton.cdiv(count, size["BK"]), batch), cut.device,
        p, sums, z, mean, mass, tokens, count, p.shape[2], width, sums.shape[1], eps,
        SHARE=SHARE, SCALE=cut.scale, PRECISION=cut.precision, **size,
    )  # fmt: skip


def _update(
    p: torch.Tensor,
    sums: torch.Tensor,
    z: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor | None,
    w: FoldedWeights,
    eps: float,
    cut: Cut,
) -> torch.Tensor:
    """Weighted means, GRU and MLP: the next slots ``[B, K, D]``, float32. ``gates``: if they are constant."""
    batch, count, width = z.shape[0], slots.shape[1], z.shape[2]
    rows = batch * count
    mean = torch.empty(batch, count, width, dtype=cut.dtype, device=cut.device)
    mass = torch.empty(batch, count, dtype=torch.float32, device=cut.device)
    weighted_mean(p, sums, z, mean, mass, eps, cut, SHARE=True)
    entered = torch.empty(batch, count, width, dtype=torch.float32, device=cut.device)
    size = cut.of("gru", "any")
    launch(
        gru, (triton.cdiv(rows, size["BM"]), triton.cdiv(width, size["BJ"])), cut.device,
        mean, mass, slots, mean if gates is None else gates, w.gru_input_weight, w.gru_hidden_weight,
        w.gru_input_bias, w.gru_mass_bias, w.gru_hidden_bias, entered,
        rows, slots.shape[0] * count, width, GIVEN=gates is not None, PRECISION=cut.precision, **size,
    )  # fmt: skip
    hidden = torch.empty(rows, w.mlp_fc1_weight.shape[0], dtype=cut.dtype, device=cut.device)
    _linear("mlp-1", entered, w.mlp_fc1_weight, w.mlp_fc1_bias, hidden, cut, NORM=True, GELU=True)
    left = torch.empty(batch, count, width, dtype=torch.float32, device=cut.device)
    _linear("mlp-2", hidden, w.mlp_fc2_weight, w.mlp_fc2_bias, left, cut, residual=entered)
    return left


def _queries(slots: torch.Tensor, w: FoldedWeights, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """What the slots ask of the tokens, ``[B, K, D]``, and their bias ``[B, K]``."""
    batch, count, width = slots.shape
    queries = torch.empty(batch, count, width, dtype=cut.dtype, device=cut.device)
    bias = torch.empty(batch, count, dtype=torch.float32, device=cut.device)
    column = (w.query_bias_weight, bias)
    _linear("queries", slots, w.query_weight, None, queries, cut, column=column, NORM=True)
    return queries, bias
