# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""One tile of each step of an iteration, on the device.

Shared by the launches for each step and the loop in one launch, so that both compute the same.

A product reads whole blocks of columns by pointers that advance, and one masked block at the end where the
widths leave one. Rows that there aren't read the last one again: that costs no mask, and they are not stored.

What the next step needs of a row travels with the tile that made it (:func:`_leave`): for every 16 columns
their mean and sum of squared deviations, in the dtype of the products a copy, and of the slots' last layer a
dot product for the queries' bias. Whoever normalises the row merges these once, before its product
(:func:`_spread`), instead of gathering a variance anew in each of its column tiles. Sixteen whatever the
tile: the order of these sums then doesn't depend on it.
"""

import triton
import triton.language as tl

from ocvtp_kernels._jit import ordered_bits

_LOG2E = tl.constexpr(1.4426950408889634)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
#: Columns that share a mean and a sum of squared deviations.
PART = 16
_PART = tl.constexpr(PART)


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
    x_ptr, y_ptr, i, j, ROWS, COLUMNS, D,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x y^T`` ``[BM, BN]`` of rows ``i`` of ``x`` ``[ROWS, D]`` and rows ``j`` of ``y`` ``[COLUMNS, D]``.

    Where there is no such row, it is that of the last one. EVEN: BC divides D.
    """
    c = tl.arange(0, BC)
    x_ptrs = x_ptr + tl.minimum(i, ROWS - 1).to(tl.int64)[:, None] * D + c[None, :]
    y_ptrs = y_ptr + tl.minimum(j, COLUMNS - 1).to(tl.int64)[:, None] * D + c[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    whole = D // BC * BC
    for _ in tl.range(0, whole, BC):
        total = tl.dot(tl.load(x_ptrs), tl.trans(tl.load(y_ptrs)), total, input_precision=PRECISION)
        x_ptrs += BC
        y_ptrs += BC
    if not EVEN:
        inside = (whole + c < D)[None, :]
        x = tl.load(x_ptrs, mask=inside, other=0.0)
        y = tl.load(y_ptrs, mask=inside, other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def logits(
    z_ptr, q_ptr, bias_ptr, n, k, N, K, D,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits ``[tokens, slots]``; -inf where there is no slot. Tokens on the rows: ``wgmma`` wants 64 of
    them, and slots may be few."""
    total = product(z_ptr, q_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
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


@triton.jit
def attend_tile(
    part, parts, image, start, z_ptr, q_ptr, bias_ptr, p_ptr, sums_ptr, keys_ptr, largest_ptr, finite_ptr,
    N, K, KS, D,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    LAST: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile ``part`` of the ``parts`` of the tokens of ``image`` (int64): softmax over slots of
    ``queries . z + bias``; ``start`` (int64): which image's queries. See ``triton.attend``."""
    n = part * BM + tl.arange(0, BM)
    z_ptr += image * N * D
    q_ptr += start * K * D
    bias_ptr += start * K
    p_ptr += image * N * KS
    sums_ptr += image * parts * KS
    keys_ptr += image * parts * K
    if ONE:
        k = tl.arange(0, BK)
        p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
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
            p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
            higher = tl.maximum(highest, tl.max(p, axis=1))
            total = total * exponential(highest - higher) + tl.sum(exponential(p - higher[:, None]), axis=1)
            highest = higher
        largest = tl.full([BM], -1.0, tl.float32)
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            p = logits(z_ptr, q_ptr, bias_ptr, n, k, N, K, D, BM, BK, BC, EVEN, PRECISION)
            p = exponential(p - highest[:, None]) * (1.0 / total)[:, None]
            some = _emit(
                p, p_ptr, sums_ptr, keys_ptr, part, n, k, N, K, KS, BM, LAST, SCALE
            )  # fmt: skip
            largest = tl.maximum(largest, some)
    if LAST:
        tl.store(largest_ptr + image * N + n, largest, mask=n < N)
        # NaN is less than nothing. Token by token: Triton 3.6 can't reduce it further for sm_100.
        tl.store(finite_ptr + image * N + n, (total < float("inf")).to(tl.uint8), mask=n < N)


@triton.jit
def update_tile(
    column, row, image, p_ptr, sums_ptr, z_ptr, u_ptr, mass_ptr, N, K, KS, D, T, eps,
    BK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SHARE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Column tile ``column`` of slot tile ``row`` of ``image`` (int64): the slots' weighted means of the
    tokens, which are added in their order. See ``triton.update``."""
    k = row * BK + tl.arange(0, BK)
    d = column * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    slots, columns = (k < KS)[None, :], (d < D)[None, :]
    p_ptrs = p_ptr + image * N * KS + n.to(tl.int64)[:, None] * KS + k[None, :]
    z_ptrs = z_ptr + image * N * D + n.to(tl.int64)[:, None] * D + d[None, :]
    total = tl.zeros([BK, BD], tl.float32)
    whole = N // BN * BN
    for _ in tl.range(0, whole, BN):
        p = tl.load(p_ptrs, mask=slots, other=0.0)
        z = tl.load(z_ptrs, mask=columns, other=0.0)
        total = tl.dot(tl.trans(p), z, total, input_precision=PRECISION)
        p_ptrs += BN * KS
        z_ptrs += BN * D
    if whole < N:
        there = (whole + n < N)[:, None]
        p = tl.load(p_ptrs, mask=there & slots, other=0.0)
        z = tl.load(z_ptrs, mask=there & columns, other=0.0)
        total = tl.dot(tl.trans(p), z, total, input_precision=PRECISION)
    mass = tl.zeros([BK], tl.float32)
    for start in tl.range(0, T, 8):
        t = start + tl.arange(0, 8)
        mass += tl.sum(block(sums_ptr + image * T * KS, t, k, T, KS, KS), axis=0)
    u = total * (1.0 / ((mass + eps) * SCALE))[:, None]
    offsets = (image * K + k)[:, None] * D + d[None, :]
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=(k < K)[:, None] & columns)
    if column == 0:
        if SHARE:
            mass = mass / (mass + eps)
        tl.store(mass_ptr + image * K + k, mass, mask=k < K)


@triton.jit
def _leave(
    y, half_ptr, parts_ptr, r, o, column, R, D, BM: tl.constexpr, BO: tl.constexpr, HALF: tl.constexpr
):
    """Of a tile ``y``, float32, of rows ``[R, D]``: its copy for the next product, and of each row's every
    ``PART`` columns the mean and the sum of squared deviations, ``parts`` ``[2, D / PART, R]``."""
    if HALF:
        offsets = r.to(tl.int64)[:, None] * D + o[None, :]
        inside = (r < R)[:, None] & (o < D)[None, :]
        tl.store(half_ptr + offsets, y.to(half_ptr.dtype.element_ty), mask=inside)
    count: tl.constexpr = BO // _PART
    real = tl.reshape(o < D, [1, count, _PART])
    y = tl.where(real, tl.reshape(y, [BM, count, _PART]), 0.0)
    part = column * count + tl.arange(0, count)
    width = tl.maximum(tl.minimum(D - part * _PART, _PART), 1).to(tl.float32)
    mean = tl.sum(y, axis=2) / width[None, :]
    away = tl.where(real, y - mean[:, :, None], 0.0)
    total = tl.cdiv(D, _PART)
    inside = (part < total)[None, :] & (r < R)[:, None]
    tl.store(parts_ptr + part.to(tl.int64)[None, :] * R + r[:, None], mean, mask=inside)
    at = (total + part).to(tl.int64)[None, :] * R + r[:, None]
    tl.store(parts_ptr + at, tl.sum(away * away, axis=2), mask=inside)


@triton.jit
def _spread(parts_ptr, r, R, D, eps, PP: tl.constexpr):
    """1 / standard deviation of rows, from what :func:`_leave` left of them (Chan)."""
    count = tl.cdiv(D, _PART)
    p = tl.arange(0, PP)
    inside = (p < count)[:, None] & (r < R)[None, :]
    means = tl.load(parts_ptr + p.to(tl.int64)[:, None] * R + r[None, :], mask=inside, other=0.0)
    at = (count + p).to(tl.int64)[:, None] * R + r[None, :]
    squares = tl.load(parts_ptr + at, mask=inside, other=0.0)
    width = tl.maximum(tl.minimum(D - p * _PART, _PART), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * width, axis=0) / D
    away = means - mean[None, :]
    return tl.rsqrt((tl.sum(squares, axis=0) + tl.sum(away * away * width, axis=0)) / D + eps)


@triton.jit
def gru_tile(
    row, column, u_ptr, mass_ptr, s_ptr, half_s_ptr, gates_ptr, wi_ptr, wh_ptr, bi_ptr, bm_ptr, bh_ptr,
    y_ptr, half_ptr, parts_ptr, R, START, D,
    BM: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, GIVEN: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column tile ``column`` of row tile ``row`` of one GRU cell. See ``triton.gru``."""
    r = row * BM + tl.arange(0, BM)
    j = column * BJ + tl.arange(0, BJ)
    c = tl.arange(0, BC)
    reset = tl.zeros([BM, BJ], tl.float32)
    keep = tl.zeros([BM, BJ], tl.float32)
    new = tl.zeros([BM, BJ], tl.float32)
    hidden = tl.zeros([BM, BJ], tl.float32)
    its_row = tl.minimum(r, R - 1).to(tl.int64)[:, None] * D + c[None, :]
    its_weight = tl.minimum(j, D - 1).to(tl.int64)[:, None] * D + c[None, :]
    u_ptrs = u_ptr + its_row
    s_ptrs = half_s_ptr + its_row
    wi_ptrs = wi_ptr + its_weight
    wh_ptrs = wh_ptr + its_weight
    whole = D // BC * BC
    for _ in tl.range(0, whole, BC):
        u = tl.load(u_ptrs)
        reset = tl.dot(u, tl.trans(tl.load(wi_ptrs)), reset, input_precision=PRECISION)
        keep = tl.dot(u, tl.trans(tl.load(wi_ptrs + D * D)), keep, input_precision=PRECISION)
        new = tl.dot(u, tl.trans(tl.load(wi_ptrs + 2 * D * D)), new, input_precision=PRECISION)
        u_ptrs += BC
        wi_ptrs += BC
        if not GIVEN:
            s = tl.load(s_ptrs)
            reset = tl.dot(s, tl.trans(tl.load(wh_ptrs)), reset, input_precision=PRECISION)
            keep = tl.dot(s, tl.trans(tl.load(wh_ptrs + D * D)), keep, input_precision=PRECISION)
            hidden = tl.dot(s, tl.trans(tl.load(wh_ptrs + 2 * D * D)), hidden, input_precision=PRECISION)
            s_ptrs += BC
            wh_ptrs += BC
    if not EVEN:
        inside = (whole + c < D)[None, :]
        u = tl.load(u_ptrs, mask=inside, other=0.0)
        w = tl.load(wi_ptrs, mask=inside, other=0.0)
        reset = tl.dot(u, tl.trans(w), reset, input_precision=PRECISION)
        w = tl.load(wi_ptrs + D * D, mask=inside, other=0.0)
        keep = tl.dot(u, tl.trans(w), keep, input_precision=PRECISION)
        w = tl.load(wi_ptrs + 2 * D * D, mask=inside, other=0.0)
        new = tl.dot(u, tl.trans(w), new, input_precision=PRECISION)
        if not GIVEN:
            s = tl.load(s_ptrs, mask=inside, other=0.0)
            w = tl.load(wh_ptrs, mask=inside, other=0.0)
            reset = tl.dot(s, tl.trans(w), reset, input_precision=PRECISION)
            w = tl.load(wh_ptrs + D * D, mask=inside, other=0.0)
            keep = tl.dot(s, tl.trans(w), keep, input_precision=PRECISION)
            w = tl.load(wh_ptrs + 2 * D * D, mask=inside, other=0.0)
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
    # Padding reads the last row of its own tile: what it would read else, another tile may be writing.
    before = tl.minimum(r, R - 1) % START
    if GIVEN:
        reset += block(gates_ptr, before, j, START, D, 3 * D)
        keep += block(gates_ptr + D, before, j, START, D, 3 * D)
        hidden = block(gates_ptr + 2 * D, before, j, START, D, 3 * D)
    else:
        reset += tl.load(bh_ptr + j, mask=real, other=0.0)[None, :]
        keep += tl.load(bh_ptr + D + j, mask=real, other=0.0)[None, :]
        hidden += tl.load(bh_ptr + 2 * D + j, mask=real, other=0.0)[None, :]
    new = _tanh(new + tl.sigmoid(reset) * hidden)
    old = block(s_ptr, before, j, START, D, D)
    y = new + tl.sigmoid(keep) * (old - new)
    tl.store(y_ptr + r.to(tl.int64)[:, None] * D + j[None, :], y, mask=(r < R)[:, None] & real[None, :])
    _leave(y, half_ptr, parts_ptr, r, j, column, R, D, BM, BJ, HALF)


@triton.jit
def linear_tile(
    row, column, x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, half_ptr, given_ptr, left_ptr, dot_ptr,
    dots_ptr, R, OUT, IN, eps,
    BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, PP: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, COLUMN: tl.constexpr,
    HALF: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column tile ``column`` of row tile ``row`` of a linear layer. See ``triton.linear``."""
    r = row * BM + tl.arange(0, BM)
    o = column * BO + tl.arange(0, BO)
    if NORM:
        rstd = _spread(given_ptr, r, R, IN, eps, PP)
    total = product(x_ptr, w_ptr, r, o, R, OUT, IN, BM, BO, BC, EVEN, PRECISION)
    if NORM:
        total = total * rstd[:, None]
    if COLUMN:
        if column == 0:
            count = tl.cdiv(IN, _PART)
            p = tl.arange(0, PP)
            at = (2 * count + p).to(tl.int64)[:, None] * R + r[None, :]
            dots = tl.load(given_ptr + at, mask=(p < count)[:, None] & (r < R)[None, :], other=0.0)
            tl.store(dots_ptr + r, tl.sum(dots, axis=0) * rstd, mask=r < R)
    else:
        total += tl.load(bias_ptr + o, mask=o < OUT, other=0.0)[None, :]
    if GELU:
        total = _gelu(total, FAST)
    offsets = r.to(tl.int64)[:, None] * OUT + o[None, :]
    inside = (r < R)[:, None] & (o < OUT)[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + offsets, mask=inside, other=0.0)
    tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=inside)
    if RESIDUAL:
        _leave(total, half_ptr, left_ptr, r, o, column, R, OUT, BM, BO, HALF)
        own: tl.constexpr = BO // _PART
        # Zero beyond the columns, so what was computed there doesn't count.
        weight = tl.load(dot_ptr + o, mask=o < OUT, other=0.0)
        real = (o < OUT)[None, :]
        dots = tl.sum(tl.reshape(tl.where(real, total * weight[None, :], 0.0), [BM, own, _PART]), axis=2)
        part = column * own + tl.arange(0, own)
        parts = tl.cdiv(OUT, _PART)
        at = (2 * parts + part).to(tl.int64)[None, :] * R + r[:, None]
        tl.store(left_ptr + at, dots, mask=(part < parts)[None, :] & (r < R)[:, None])


def padded_parts(width: int) -> int:
    """Parts that a row of ``width`` columns is cut into, as a block of them has."""
    return max(2, triton.next_power_of_2(triton.cdiv(width, PART)))
