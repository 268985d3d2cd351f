# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Received attention as Triton kernels: the attention map lives in registers, a tile at a time.

``row_lse`` walks the keys and leaves each query's log-sum-exp; ``column_mean`` walks the queries and sums
each key's column; ``head_mean`` averages heads in their order. No atomics: same bits whatever the batch. A
caller whose attention kernel returned the log-sum-exp starts at the second.

Floor at (B, H, N, d) = (64, 16, 577, 64), 16 bit: each pass takes 341 M exponentials, 92 us at 16 a clock on
each of 132 SMs, and 44 GFLOP of QK^T, 55 us at 800 TFLOP/s beside them; 151 MB of q and k, 45 us. So 184 us
from q and k alone, 92 us with a given log-sum-exp. The materialised map moves 1.4 GB at the least, 410 us.
Instructions stand above that: 2504 and 2152 a warp, counted in what Triton 3.9 makes for sm_90, are 111 and
95 us at four a clock of each SM. So whole blocks go without masks, and addresses move on by one addition.
"""

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._jit import LOG2E, after_launches_before
from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import tile
from ocvtp_kernels.received_attention.shapes import MAX_SEGMENTS

# Head dims are covered by one or two powers of two: (shape class, first, second).
_HEAD_DIMS = {64: ("d64", 64, 0), 80: ("d80", 64, 16), 96: ("d96", 64, 32), 128: ("d128", 128, 0)}


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def _segment(program, bounds_ptr, S, N, BLOCK: tl.constexpr, SP: tl.constexpr):
    """Start and length of the segment that this program works in, which of its blocks is meant, and 1.

    Programs are dealt to segments in order, as many as each has blocks; a program too many gets length 0.
    Where bounds don't ascend from 0 to N, there is one segment, of all N, and 0.
    """
    i = tl.arange(0, SP)
    start = tl.load(bounds_ptr + i, mask=i < S, other=0)
    end = tl.load(bounds_ptr + 1 + i, mask=i < S, other=0)
    wrong = (start > end) | ((i == 0) & (start != 0)) | ((i == S - 1) & (end != N))
    right = tl.sum(wrong.to(tl.int32), axis=0) == 0
    start = start.to(tl.int32)
    end = end.to(tl.int32)
    blocks = (end - start + BLOCK - 1) // BLOCK
    until = tl.cumsum(blocks, axis=0)
    mine = i == tl.sum(((until <= program) & (i < S)).to(tl.int32), axis=0)
    first = tl.sum(tl.where(mine, start, 0), axis=0)
    length = tl.sum(tl.where(mine, end - start, 0), axis=0)
    block = program - tl.sum(tl.where(mine, until - blocks, 0), axis=0)
    first = tl.where(right, first, 0)
    return first, tl.where(right, length, N), tl.where(right, block, program), right.to(tl.int32)


@triton.jit
def _places(
    ptr, row, stride_row, stride_d, FIRST: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Pointers ``[rows, D]`` into a head, from column FIRST on."""
    d = FIRST + tl.arange(0, D)
    rows = (row.to(tl.int64) * stride_row * UNIT)[:, None]
    columns = d.to(tl.int64)[None, :] * stride_d
    if UNIT == 1:  # an address for each number: pointers to rows would take registers besides
        return ptr + (rows + columns)
    return ptr + rows + columns


@triton.jit
def _rows(
    places, real, FIRST: tl.constexpr, D: tl.constexpr, HD: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """What lies at ``places``; zeros beyond the head dim HD and, unless all rows are there (WHOLE), where a
    row is not ``real``."""
    inside = (FIRST + tl.arange(0, D) < HD)[None, :]
    if FIRST + D <= HD:
        return tl.load(places) if WHOLE else tl.load(places, mask=real[:, None], other=0.0)
    return tl.load(places, mask=inside if WHOLE else real[:, None] & inside, other=0.0)


@triton.jit
def _logits(
    a0, a1, b0_ptrs, b1_ptrs, real,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Products of the rows of ``a`` with a block of rows of ``b``."""
    b = tl.trans(_rows(b0_ptrs, real, 0, D0, HD, WHOLE))
    logits = tl.dot(a0, b, input_precision=PRECISION)
    if D1 > 0:
        b = tl.trans(_rows(b1_ptrs, real, D0, D1, HD, WHOLE))
        logits = tl.dot(a1, b, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _grown(logits, scale, highest, total):
    """Each row's highest logit, and the sum of exponentials below it, with a block of keys more."""
    higher = tl.maximum(highest, tl.max(logits, axis=1) * scale)
    total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits * scale - higher[:, None]), axis=1)
    return higher, total


@triton.jit
def _with_keys(
    q0, q1, k0_ptrs, k1_ptrs, real, scale, highest, total,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``_grown`` by the keys that are at these places."""
    logits = _logits(q0, q1, k0_ptrs, k1_ptrs, real, HD, D0, D1, PRECISION, WHOLE)
    if not WHOLE:
        logits = tl.where(real[None, :], logits, float("-inf"))
    return _grown(logits, scale, highest, total)


@triton.jit
def _of_queries(
    k0, k1, q0_ptrs, q1_ptrs, lse_ptrs, real, scale,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What each key receives of a block of queries; of those that are not there exp2(-inf) = 0."""
    # Before the product, which it then need not wait for.
    lse = tl.load(lse_ptrs) if WHOLE else tl.load(lse_ptrs, mask=real, other=float("inf"))
    logits = _logits(k0, k1, q0_ptrs, q1_ptrs, real, HD, D0, D1, PRECISION, WHOLE)
    return tl.sum(tl.exp2(logits * scale - lse[None, :]), axis=1)


# -------------------------------------------------------------------------------------------------- kernels
# A loop over whole blocks, whose pointers move on, and one more block with a mask. That takes registers, and
# three products of 32 bits, an address for each number, or 4096 bounds leave none: there, every block has the
# mask.


@triton.jit(do_not_specialize=["M", "N", "S"])
def row_lse(
    q_ptr, k_ptr, lse_ptr, bounds_ptr, q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, scale, M, N, S,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SP: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, H, B): base-2 log-sum-exp of every query's logits, ``[B, H, M]`` float32.

    ``scale`` > 0 includes log2(e). Strides but the last are in units of UNIT elements, which tells the
    compiler that rows start at multiples of 16 bytes. SP > 0: B is 1, and the S segments between ``bounds``
    attend to themselves.
    """
    after_launches_before(PDL)
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    rows, keys, first = M, N, 0
    if SP > 0:
        first, rows, block, right = _segment(block, bounds_ptr, S, N, BM, SP)
        rows *= right  # of bounds that are none, nothing is computed
        keys = rows
    m = block * BM + tl.arange(0, BM)
    q_ptr += (image * q_b + head * q_h) * UNIT
    k_ptr += (image * k_b + head * k_h) * UNIT
    q0 = _rows(_places(q_ptr, first + m, q_m, q_d, 0, D0, UNIT), m < rows, 0, D0, HD, False)
    q1 = q0
    if D1 > 0:
        q1 = _rows(_places(q_ptr, first + m, q_m, q_d, D0, D1, UNIT), m < rows, D0, D1, HD, False)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    D: tl.constexpr = D1 if D1 > 0 else D0
    if (UNIT > 1 and SP <= 64) and q_ptr.dtype.element_ty.primitive_bitwidth == 16:
        n = tl.arange(0, BN)
        k0_ptrs = _places(k_ptr, first + n, k_n, k_d, 0, D0, UNIT)
        k1_ptrs = _places(k_ptr, first + n, k_n, k_d, D0, D, UNIT)
        step = tl.cast(k_n, tl.int64) * (BN * UNIT)
        whole = keys // BN * BN
        for _ in tl.range(0, whole, BN):
            highest, total = _with_keys(
                q0, q1, k0_ptrs, k1_ptrs, n < keys, scale, highest, total, HD, D0, D1, PRECISION, True
            )  # fmt: skip
            k0_ptrs += step
            k1_ptrs += step
        if whole < keys:
            highest, total = _with_keys(
                q0, q1, k0_ptrs, k1_ptrs, whole + n < keys, scale, highest, total,
                HD, D0, D1, PRECISION, False,
            )  # fmt: skip
    else:
        for start in tl.range(0, keys, BN):
            n = start + tl.arange(0, BN)
            real = n < keys  # before addresses: in the other order ptxas spills twice for sm_86
            k0_ptrs = _places(k_ptr, first + n, k_n, k_d, 0, D0, UNIT)
            k0 = tl.trans(_rows(k0_ptrs, real, 0, D0, HD, False))
            logits = tl.dot(q0, k0, input_precision=PRECISION)
            if D1 > 0:
                k1_ptrs = _places(k_ptr, first + n, k_n, k_d, D0, D1, UNIT)
                k1 = tl.trans(_rows(k1_ptrs, real, D0, D1, HD, False))
                logits = tl.dot(q1, k1, logits, input_precision=PRECISION)
            logits = tl.where(real[None, :], logits, float("-inf"))
            highest, total = _grown(logits, scale, highest, total)
    lse_ptr += (image * tl.num_programs(1) + head) * M + first
    tl.store(lse_ptr + m, highest + tl.log2(total), mask=m < rows)


@triton.jit(do_not_specialize=["M", "N", "S"])
def column_mean(
    q_ptr, k_ptr, lse_ptr, means_ptr, bounds_ptr, q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d,
    scale, M, N, S,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SP: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, H, B): mean over queries of ``exp2(q k^T * scale - lse)``, ``[B, H, N]``.

    Keys lie on the rows of the product, where summing over queries stays within a few threads. NaN where
    ``bounds`` are not what they should be.
    """
    after_launches_before(PDL)
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    rows, keys, first = M, N, 0
    if SP > 0:
        first, keys, block, right = _segment(block, bounds_ptr, S, N, BN, SP)
        rows = keys * right
    n = block * BN + tl.arange(0, BN)
    q_ptr += (image * q_b + head * q_h) * UNIT
    k_ptr += (image * k_b + head * k_h) * UNIT
    lse_ptr += (image * tl.num_programs(1) + head) * M + first
    k0 = _rows(_places(k_ptr, first + n, k_n, k_d, 0, D0, UNIT), n < keys, 0, D0, HD, False)
    k1 = k0
    if D1 > 0:
        k1 = _rows(_places(k_ptr, first + n, k_n, k_d, D0, D1, UNIT), n < keys, D0, D1, HD, False)
    total = tl.zeros([BN], tl.float32)
    D: tl.constexpr = D1 if D1 > 0 else D0
    if (UNIT > 1 and SP <= 64) and q_ptr.dtype.element_ty.primitive_bitwidth == 16:
        m = tl.arange(0, BM)
        q0_ptrs = _places(q_ptr, first + m, q_m, q_d, 0, D0, UNIT)
        q1_ptrs = _places(q_ptr, first + m, q_m, q_d, D0, D, UNIT)
        lse_ptrs = lse_ptr + m
        step = tl.cast(q_m, tl.int64) * (BM * UNIT)
        whole = rows // BM * BM
        for _ in tl.range(0, whole, BM):
            total += _of_queries(
                k0, k1, q0_ptrs, q1_ptrs, lse_ptrs, m < rows, scale, HD, D0, D1, PRECISION, True
            )  # fmt: skip
            q0_ptrs += step
            q1_ptrs += step
            lse_ptrs += BM
        if whole < rows:
            total += _of_queries(
                k0, k1, q0_ptrs, q1_ptrs, lse_ptrs, whole + m < rows, scale, HD, D0, D1, PRECISION, False
            )  # fmt: skip
    else:
        for start in tl.range(0, rows, BM):
            m = start + tl.arange(0, BM)
            q0_ptrs = _places(q_ptr, first + m, q_m, q_d, 0, D0, UNIT)
            q0 = tl.trans(_rows(q0_ptrs, m < rows, 0, D0, HD, False))
            logits = tl.dot(k0, q0, input_precision=PRECISION)
            if D1 > 0:
                q1_ptrs = _places(q_ptr, first + m, q_m, q_d, D0, D1, UNIT)
                q1 = tl.trans(_rows(q1_ptrs, m < rows, D0, D1, HD, False))
                logits = tl.dot(k1, q1, logits, input_precision=PRECISION)
            lse = tl.load(lse_ptr + m, mask=m < rows, other=float("inf"))
            total += tl.sum(tl.exp2(logits * scale - lse[None, :]), axis=1)
    means_ptr += (image * tl.num_programs(1) + head) * N + first
    mean = total / tl.maximum(rows, 1)
    if SP > 0:
        mean = tl.where(tl.zeros([BN], tl.int32) + right > 0, mean, float("nan"))
    tl.store(means_ptr + n, mean, mask=n < keys)  # a program too many has none


@triton.jit(do_not_specialize=["H", "N"])
def head_mean(means_ptr, out_ptr, H, N, BH: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr):
    """Grid (token tiles, B): mean of ``[B, H, N]`` over H, in order."""
    after_launches_before(PDL)
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    h = tl.arange(0, BH)
    total = tl.zeros([BN], tl.float32)
    for first in tl.range(0, H, BH):
        offsets = (image * H + first + h)[:, None] * N + n[None, :]
        inside = (first + h < H)[:, None] & (n < N)[None, :]
        total += tl.sum(tl.load(means_ptr + offsets, mask=inside, other=0.0), axis=0)
    tl.store(out_ptr + image * N + n, total / H, mask=n < N)


# ------------------------------------------------------------------------------------------------- launcher


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """``[B, N]`` float32 of ``q`` ``[B, H, M, d]`` and ``k`` ``[B, H, N, d]``."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    device = q.device
    arch = architecture(device)
    assert arch is not None
    shape, d0, d1 = next(row for limit, row in _HEAD_DIMS.items() if head_dim <= limit)
    shape += "-32bit" if q.dtype == torch.float32 else "-16bit"
    segments = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    unit = 8 if all(stride % 8 == 0 for x in (q, k) for stride in x.stride()[:3]) else 1
    head = {
        "HD": head_dim,
        "D0": d0,
        "D1": d1,
        "SP": 0 if cu_seqlens is None else 64 if segments <= 64 else MAX_SEGMENTS,
        # Three tf32 products are as good as float32, and on tensor cores; CDNA has float32 ones.
        "PRECISION": "ieee" if arch.startswith("gfx") else "tf32x3",
        "UNIT": unit,
    }
    strides = [s // unit if axis < 3 else s for x in (q, k) for axis, s in enumerate(x.stride())]
    bounds = lse_rows = q  # not read unless there are any
    if cu_seqlens is not None:
        bounds = cu_seqlens.contiguous()
    if lse is None:
        cut = tile("received_attention.row_lse", arch, shape)
        lse_rows = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
        launch(
            row_lse, (triton.cdiv(queries, cut["BM"]) + segments, heads, batch), device,
            q, k, lse_rows, bounds, *strides, scale * LOG2E, queries, keys, segments, **head, **cut,
        )  # fmt: skip
    else:
        lse_rows = (lse.to(torch.float32) * LOG2E).contiguous()
    cut = tile("received_attention.column_mean", arch, shape)
    means = torch.empty(batch, heads, keys, dtype=torch.float32, device=device)
    launch(
        column_mean, (triton.cdiv(keys, cut["BN"]) + segments, heads, batch), device,
        q, k, lse_rows, means, bounds, *strides, scale * LOG2E, queries, keys, segments, **head, **cut,
    )  # fmt: skip
    cut = tile("received_attention.head_mean", arch, "any")
    received = torch.empty(batch, keys, dtype=torch.float32, device=device)
    launch(head_mean, (triton.cdiv(keys, cut["BN"]), batch), device, means, received, heads, keys, **cut)
    return received
