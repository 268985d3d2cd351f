# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Token selection as Triton kernels.

Selection of one image is one program's work, in registers: mark each slot's top token, find by search the
score of the last token that still gets in, and number the tokens that are in by a running count, which leaves
them sorted. Everything after the comparison of scores is integer arithmetic, so results are exact and do not
depend on tiles, splits or batch.

Floor at (B, K, N, keep, C) = (64, 64, 576, 64, 1024), 16-bit rows, float32 map: 9.4 MB of slot attention and
2 x 8.4 MB of rows, 8 us at 3.35 TB/s. At B=1 it is latency: one launch and about 12 dependent reductions over
a block. Marking costs about 8 instructions per (slot, token), which one block bears alone; from
_SCAN_LIMIT on, a launch of its own spreads it over the GPU.
"""

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture, processors
from ocvtp_kernels._jit import after_launches_before, ordered_bits
from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import tile
from ocvtp_kernels.selection.shapes import ALLOW, GRID, MAX_TOKENS, even_rows

_SIZES = (256, 1024, MAX_TOKENS)
# Slots x padded tokens that one block marks by itself: 2 us of its instructions, what a launch costs.
_SCAN_LIMIT = 65536
# Rows are copied, not computed with: as integers of their size, so that a kernel serves all their dtypes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# The lowest key of a score that is infinite or NaN.
_INFINITE = tl.constexpr(0x7F80000000000000)

# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def _zero_is_zero(x):
    """float32 of ``x`` with -0.0 as 0.0: they are equal, so their index must decide."""
    x = x.to(tl.float32)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _search(scores, active, want, BITS: tl.constexpr):
    """The ``want``-th largest of the ``active`` uint32 ``scores``: BITS bits a round, from the highest."""
    scores = tl.where(active, scores, 0)
    digits = tl.arange(0, 1 << BITS).to(tl.uint32)
    step = tl.full([], 1 << (32 - BITS), tl.uint32)
    found = tl.full([], 0, tl.uint32)
    for _ in range(32 // BITS):
        candidates = found + digits * step
        reach = tl.sum((scores[:, None] >= candidates[None, :]).to(tl.int32), axis=0)
        digit = tl.sum(((reach >= want) & (digits > 0)).to(tl.int32), axis=0)
        found = found + digit.to(tl.uint32) * step
        step = step >> BITS
    return found


@triton.jit
def _is_wrong(x):
    """NaN or infinite, as int32."""
    return (tl.abs(x) < float("inf")).to(tl.int32) ^ 1


@triton.jit
def _marked_by_scan(
    map_ptr, stride_k, stride_n, K, N, NP: tl.constexpr, BK: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    """Which tokens are some slot's top token, every token's largest attention, and, with CHECK, how many
    have some that is not finite; reads the map once."""
    n = tl.arange(0, NP)
    k = tl.arange(0, BK)
    marked = tl.zeros([NP], tl.int32)
    wrong = tl.zeros([NP], tl.int32)
    largest = tl.full([NP], float("-inf"), tl.float32)
    for first in tl.range(0, K, BK):
        slot = first + k
        inside = (slot < K)[:, None] & (n < N)[None, :]
        offsets = slot.to(tl.int64)[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
        values = tl.load(map_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        # Ties, 0.0 and -0.0 among them, go to the lowest index.
        _, top = tl.max(values, axis=1, return_indices=True)
        top = tl.where(slot < K, top, NP)
        marked = tl.maximum(marked, tl.max((n[None, :] == top[:, None]).to(tl.int32), axis=0))
        largest = tl.maximum(largest, tl.max(values, axis=0))
        if CHECK:
            wrong = tl.maximum(wrong, tl.max(tl.where(inside, _is_wrong(values), 0), axis=0))
    return marked > 0, largest, tl.sum(wrong, axis=0)


@triton.jit
def _marked_by_parts(parts_ptr, K, T, NP: tl.constexpr, KP: tl.constexpr):
    """Which tokens are some slot's top token, from the parts that ``top_parts`` left; and how many slots'
    attention is not finite, by the keys of :func:`top_parts`. A key that names no token marks none."""
    n = tl.arange(0, NP)
    marked = tl.zeros([NP], tl.int32)
    wrong = tl.zeros([KP], tl.int32)
    for first in tl.range(0, K, KP):
        slot = first + tl.arange(0, KP)
        real = slot < K
        best = tl.full([KP], -0x8000000000000000, tl.int64)
        for start in tl.range(0, T, 8):
            for offset in tl.static_range(8):  # eight loads under way at a time
                part = start + offset
                exists = slot < tl.where(part < T, K, 0)
                found = tl.load(parts_ptr + part * K + slot, mask=exists, other=-0x8000000000000000)
                best = tl.maximum(best, found)
        top = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        names = real & (top < NP)  # a histogram has no place for others
        # Triton 3.3's takes no mask: what names none is counted at token 0 and taken off again.
        spare = tl.sum((slot >= 0).to(tl.int32) - names.to(tl.int32), axis=0)
        marked += tl.histogram(tl.where(names, top, 0), NP) - tl.where(n == 0, spare, 0)
        wrong += (real & (best >= _INFINITE)).to(tl.int32)
    return marked > 0, tl.sum(wrong, axis=0)


@triton.jit
def _evenly(t, N, KEEP, WIDTH, DOWN):
    """The ``t``-th of KEEP tokens spread evenly; see :func:`ocvtp_kernels.selection.shapes.even_rows`."""
    row = ((t + 1) * DOWN - 1) // KEEP
    first = KEEP * row // DOWN
    across = KEEP * (row + 1) // DOWN - first
    y = (2 * row + 1) * (N // WIDTH) // (2 * DOWN)
    return y * WIDTH + (2 * (t - first) + 1) * WIDTH // (2 * across)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["K", "N"])
def top_parts(
    map_ptr, parts_ptr, largest_ptr, stride_b, stride_k, stride_n, K, N,
    BN: tl.constexpr, BK: tl.constexpr, FILL: tl.constexpr, CHECK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): every slot's best token of this tile, as one integer that orders like
    (score, lower index); and, without fill scores, each token's largest attention. CHECK: a slot that has
    NaN or Inf here leaves a key above all others."""
    after_launches_before(PDL)
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    n = part * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    largest = tl.full([BN], float("-inf"), tl.float32)
    for first in tl.range(0, K, BK):
        slot = first + k
        inside = (slot < K)[:, None] & (n < N)[None, :]
        offsets = slot.to(tl.int64)[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
        values = tl.load(map_ptr + image * stride_b + offsets, mask=inside, other=float("-inf")).to(
            tl.float32
        )
        best, top = tl.max(values, axis=1, return_indices=True)
        score = ordered_bits(_zero_is_zero(best)).to(tl.int64) - 0x80000000  # signed, as the key is
        key = (score << 32) | (0x7FFFFFFF - part * BN - top).to(tl.int64)
        if CHECK:
            wrong = tl.max(tl.where(inside, _is_wrong(values), 0), axis=1)
            key = tl.where(wrong > 0, 0x7FFFFFFFFFFFFFFF, key)
        tl.store(parts_ptr + (image * tl.num_programs(0) + part) * K + slot, key, mask=slot < K)
        largest = tl.maximum(largest, tl.max(values, axis=0))
    if not FILL:
        tl.store(largest_ptr + image * N + n, largest, mask=n < N)


# C is not among them: rows of a multiple of 16 bytes are copied 16 bytes at a time, if the compiler knows.
@triton.jit(do_not_specialize=["K", "N", "T", "KEEP", "WIDTH", "DOWN", "fill_b"])
def select(
    map_ptr, fill_ptr, parts_ptr, finite_ptr, x_ptr, indices_ptr, count_ptr, rows_ptr,
    map_b, map_k, map_n, fill_b, fill_n, x_b, x_n, x_c, K, N, T, KEEP, WIDTH, DOWN, C,
    NP: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr, BITS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, SCAN: tl.constexpr, FILL: tl.constexpr, ROWS: tl.constexpr,
    CHECK: tl.constexpr, FINITE: tl.constexpr, GRID: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (G, B): each of an image's G programs makes the same selection, then copies its share of rows.

    SCAN: find top tokens in the map; else take the ``T`` parts that ``top_parts``, or the last iteration of
    Slot Attention, left. FILL: scores are in ``fill_ptr``; else a token's largest attention counts (SCAN).
    CHECK: the count of an image whose map or scores are not finite is -1; of its map tells ``finite``
    ``[B, N]`` (FINITE), or the parts, or the map. GRID: such an image keeps tokens spread evenly.
    """
    after_launches_before(PDL)
    program = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, NP)
    real = n < N
    if SCAN:
        marked, scores, wrong = _marked_by_scan(map_ptr + image * map_b, map_k, map_n, K, N, NP, BK, CHECK)
    else:
        marked, wrong = _marked_by_parts(parts_ptr + image * T * K, K, T, NP, KP)
    if FILL:
        offsets = image * fill_b + n.to(tl.int64) * fill_n
        scores = tl.load(fill_ptr + offsets, mask=real, other=float("-inf"))
    scores = ordered_bits(_zero_is_zero(scores))

    marked = marked & real  # comparing NaN, a reduction may name padding
    # Either every marked token stays and the others compete for what is left, or the marked ones compete.
    count = tl.sum(marked.to(tl.int32), axis=0)
    roomy = tl.zeros([NP], tl.int32) + count < KEEP  # a block: the interpreter splats bool scalars as int
    stays = marked & roomy
    competes = real & (marked ^ roomy)
    want = KEEP - tl.where(count < KEEP, count, 0)
    last = _search(scores, competes, want, BITS)
    above = competes & (scores > last)
    equal = competes & (scores == last)
    spare = want - tl.sum(above.to(tl.int32), axis=0)
    kept = stays | above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= spare))
    position = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    indices_ptr += image * KEEP
    count = tl.minimum(count, KEEP)
    if CHECK:
        # Of ordered bits, those between the infinities. Here and not above: less to hold meanwhile.
        strange = real & (scores - 0x00800000 >= 0xFF000000)
        if FINITE:
            strange |= tl.load(finite_ptr + image * N + n, mask=real, other=1) == 0
            wrong = 0
        wrong += tl.sum(strange.to(tl.int32), axis=0)
        count = tl.where(wrong > 0, -1, count)
        if GRID:
            sound = tl.zeros([NP], tl.int32) + wrong == 0
            kept &= sound
            even = _evenly(n, N, KEEP, WIDTH, DOWN).to(tl.int64)
            tl.store(indices_ptr + n, even, mask=(n < KEEP) & (sound ^ True))
    tl.store(indices_ptr + position, n.to(tl.int64), mask=kept)  # the same values from every program
    if program == 0:
        tl.store(count_ptr + image, count.to(tl.int64))
    if ROWS:
        tl.debug_barrier()  # this block's own indices are read back below
        for first in tl.range(program * BR, KEEP, tl.num_programs(0) * BR):
            _copy_rows(
                x_ptr + image * x_b,
                rows_ptr + image * KEEP * C,
                indices_ptr,
                first,
                x_n,
                x_c,
                N,
                KEEP,
                C,
                BR,
                BC,
            )


@triton.jit
def _copy_rows(
    x_ptr, rows_ptr, indices_ptr, first, stride_n, stride_c, N, KEEP, C, BR: tl.constexpr, BC: tl.constexpr
):
    """``rows[t] = x[indices[t]]`` for the BR rows from ``first`` on; zeros where an index is no token."""
    t = first + tl.arange(0, BR)
    token = tl.load(indices_ptr + t, mask=t < KEEP, other=0)
    exists = (token >= 0) & (token < N)
    for start in tl.range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (t < KEEP)[:, None] & (c < C)[None, :]
        offsets = token[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_c
        values = tl.load(x_ptr + offsets, mask=inside & exists[:, None], other=0)
        tl.store(rows_ptr + t.to(tl.int64)[:, None] * C + c[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["N", "KEEP"])
def gather(
    x_ptr, indices_ptr, rows_ptr, x_b, x_n, x_c, N, KEEP, C,
    BR: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B): ``rows[b, t] = x[b, indices[b, t]]``. ``indices`` contiguous."""
    after_launches_before(PDL)
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BR
    _copy_rows(
        x_ptr + image * x_b,
        rows_ptr + image * KEEP * C,
        indices_ptr + image * KEEP,
        first,
        x_n,
        x_c,
        N,
        KEEP,
        C,
        BR,
        BC,
    )


@triton.jit(do_not_specialize=["KEEP", "N"])
def scatter(
    rows_ptr, indices_ptr, x_ptr, rows_b, rows_t, rows_c, KEEP, N, C,
    BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, channel tiles, B): the gather's transpose, ``x[b, n]`` = sum of the rows taken from
    ``n``, in their order; every element is written once, zeros too. Indices need not be unique or sorted."""
    image = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BN, BC], tl.float64 if DOUBLE else tl.float32)
    rows_ptr += image * rows_b
    for first in tl.range(0, KEEP, BT):
        t = first + tl.arange(0, BT)
        token = tl.load(indices_ptr + image * KEEP + t, mask=t < KEEP, other=-1)
        # The first row of this chunk taken from each token, then the next, as long as any token has one.
        row = tl.min(tl.where(token[None, :] == n[:, None], t[None, :], KEEP), axis=1)
        while tl.min(row, axis=0) < KEEP:
            offsets = row.to(tl.int64)[:, None] * rows_t + c.to(tl.int64)[None, :] * rows_c
            inside = (row < KEEP)[:, None] & (c < C)[None, :]
            total += tl.load(rows_ptr + offsets, mask=inside, other=0.0).to(total.dtype)
            later = (token[None, :] == n[:, None]) & (t[None, :] > row[:, None])
            row = tl.min(tl.where(later, t[None, :], KEEP), axis=1)
    offsets = image * N * C + n.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(x_ptr + offsets, total.to(x_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


# ------------------------------------------------------------------------------------------------- launchers


def select_tokens(
    slot_attention: torch.Tensor,
    keep: int,
    fill_scores: torch.Tensor | None,
    x: torch.Tensor | None,
    not_finite: int = ALLOW,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Indices ``[B, keep]``, picks among them ``[B]``, and rows ``[B, keep, C]`` if ``x`` ``[B, N, C]``."""
    batch, slots, tokens = slot_attention.shape
    device = slot_attention.device
    if slots * _padded(tokens) <= _SCAN_LIMIT:
        return _select(slot_attention, None, slots, tokens, keep, fill_scores, x, None, not_finite)
    arch = architecture(device)
    assert arch is not None
    cut = tile("selection.top_parts", arch, "any")
    tiles = triton.cdiv(tokens, cut["BN"])
    parts = torch.empty(batch, tiles, slots, dtype=torch.int64, device=device)
    scores = fill_scores
    if scores is None:
        scores = torch.empty(batch, tokens, dtype=torch.float32, device=device)
    launch(
        top_parts, (tiles, batch), device,
        slot_attention, parts, scores, *slot_attention.stride(), slots, tokens,
        FILL=fill_scores is not None, CHECK=not_finite != ALLOW, **cut,
    )  # fmt: skip
    return _select(None, parts, slots, tokens, keep, scores, x, None, not_finite)


def select_from_keys(
    keys: torch.Tensor,
    keep: int,
    scores: torch.Tensor,
    x: torch.Tensor | None,
    finite: torch.Tensor | None = None,
    not_finite: int = ALLOW,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same of parts ``[B, T, K]`` that another kernel left; ``finite`` ``[B, N]`` bool: of whom."""
    slots, tokens = keys.shape[2], scores.shape[1]
    return _select(None, keys.contiguous(), slots, tokens, keep, scores, x, finite, not_finite)


def _padded(tokens: int) -> int:
    return next(size for size in _SIZES if tokens <= size)


def _select(
    slot_attention: torch.Tensor | None,
    parts: torch.Tensor | None,
    slots: int,
    tokens: int,
    keep: int,
    scores: torch.Tensor | None,
    x: torch.Tensor | None,
    finite: torch.Tensor | None,
    not_finite: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """From a map that one program scans, or from parts."""
    source = parts if slot_attention is None else slot_attention
    assert source is not None
    batch, device = source.shape[0], source.device
    arch = architecture(device)
    assert arch is not None
    padded = _padded(tokens)
    indices = torch.empty(batch, keep, dtype=torch.int64, device=device)
    from_slots = torch.empty(batch, dtype=torch.int64, device=device)
    cut = tile("selection.select", arch, f"N<={padded}")
    rows, programs, width = None, 1, 0
    strides: tuple[int, ...] = (0, 0, 0)
    if x is not None:
        width, strides = x.shape[2], x.stride()
        rows = torch.empty(batch, keep, width, dtype=x.dtype, device=device)
        programs = max(1, min(processors(device) // max(batch, 1), triton.cdiv(keep, cut["BR"])))
    checked = not_finite != ALLOW
    if not checked:
        finite = None
    across, down = even_rows(tokens, keep) if not_finite == GRID else (1, 1)
    launch(
        select, (programs, batch), device,
        source, source if scores is None else scores, source if parts is None else parts,
        source if finite is None else finite.contiguous().view(torch.uint8),
        indices if x is None else x.view(_BITS[x.itemsize]), indices, from_slots,
        indices if rows is None else rows.view(_BITS[rows.itemsize]),
        *(source.stride() if parts is None else (0, 0, 0)), *((0, 0) if scores is None else scores.stride()),
        *strides, slots, tokens, 0 if parts is None else parts.shape[1], keep, across, down, width,
        NP=padded, SCAN=parts is None, FILL=scores is not None, ROWS=x is not None,
        CHECK=checked, FINITE=finite is not None, GRID=not_finite == GRID, **cut,
    )  # fmt: skip
    return indices, from_slots, rows


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``[B, keep, C]`` of ``x`` ``[B, N, C]``."""
    arch = architecture(x.device)
    assert arch is not None
    cut = tile("selection.gather", arch, "any")
    batch, keep = indices.shape
    rows = torch.empty(batch, keep, x.shape[2], dtype=x.dtype, device=x.device)
    bits = _BITS[x.itemsize]
    launch(
        gather, (triton.cdiv(keep, cut["BR"]), batch), x.device,
        x.view(bits), indices.contiguous(), rows.view(bits), *x.stride(), x.shape[1], keep, x.shape[2], **cut,
    )  # fmt: skip
    return rows


def scatter_tokens(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[B, tokens, C]`` with the rows ``[B, keep, C]`` added in at their indices, zero elsewhere."""
    if rows.is_complex():  # as pairs of channels
        pairs = torch.view_as_real(rows.resolve_conj()).flatten(2)
        return torch.view_as_complex(scatter_tokens(pairs, indices, tokens).unflatten(2, (-1, 2)))
    arch = architecture(rows.device)
    assert arch is not None
    cut = tile("selection.scatter", arch, "any")
    batch, keep, width = rows.shape
    x = torch.empty(batch, tokens, width, dtype=rows.dtype, device=rows.device)
    grid = (triton.cdiv(tokens, cut["BN"]), triton.cdiv(width, cut["BC"]), batch)
    launch(
        scatter, grid, rows.device,
        rows, indices.contiguous(), x, *rows.stride(), keep, tokens, width,
        DOUBLE=rows.dtype == torch.float64, **cut,
    )  # fmt: skip
    return x
