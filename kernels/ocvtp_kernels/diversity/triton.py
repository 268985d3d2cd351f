# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Farthest points and the largest volume as Triton kernels.

    statistics, central, farthest       mean and range; distance to the mean; every further token
    statistics, units, volume           range; one over each token's norm; every token

A step takes the best token of the step before, compares it with all others, and leaves the best of them. Of
an image with up to SMALL numbers one program goes through all steps, in one launch, and waits at barriers of
its own threads alone. Of a larger one, a launch is one step, and every tile of tokens has a program. The
kernel is the same, and so are the bits. No atomics: the best token is found by comparing integers.

An image of (N, C, keep) = (576, 1024, 64) in 16 bit, counted: a step reads 1.2 MB, from L2 at best. One
multiprocessor of an H100 loads at most 64 bytes a clock, 112 GB/s: 10.5 us a step, 0.66 ms in all; in float32
twice that.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._jit import ordered_bits
from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import Tile, tile
from ocvtp_kernels.diversity.reference import EPS

#: Numbers N * C of an image that one program goes through alone.
SMALL = 2**20

# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def _order(value):
    """float32 -> int64 with the same order, between -2**31 and 2**31; 0.0 and above are 0 and above."""
    return ordered_bits(value).to(tl.int64) - 0x80000000


@triton.jit
def _key(order, n, N):
    """Order above, token below, the lowest the largest: of all keys the largest is the choice."""
    return tl.where(n < N, (order << 32) | (0x7FFFFFFF - n).to(tl.int64), -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _best(keys_ptr, count, BT: tl.constexpr):
    """The largest key."""
    best = tl.full([BT], -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in tl.range(0, count, BT):
        k = start + tl.arange(0, BT)
        best = tl.maximum(best, tl.load(keys_ptr + k, mask=k < count, other=-0x7FFFFFFFFFFFFFFF))
    return tl.max(best, axis=0)


@triton.jit
def _half(keys_ptr, i, room):
    """An image's part of ``[2, B, room]``, in the half that step ``i`` reads."""
    row = (i & 1) * tl.num_programs(1) + tl.program_id(1)
    return keys_ptr + row.to(tl.int64) * room


@triton.jit
def _token(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _scale(peaks_ptr, C):
    """The power of two that brings an image's largest value near 1, from its columns' largest sizes."""
    peak = tl.zeros([1024], tl.float32)
    for start in tl.range(0, C, 1024):
        c = start + tl.arange(0, 1024)
        peak = tl.maximum(peak, tl.load(peaks_ptr + c, mask=c < C, other=0.0))
    exponent = ((tl.max(peak, axis=0).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    exponent = tl.minimum(tl.maximum(exponent, -120), 120)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _tokens(x_ptr, x_n, n, c, scale, N, C):
    """Scaled tokens ``[n, c]``; zeros outside."""
    inside = (n < N)[:, None] & (c < C)[None, :]
    offsets = n.to(tl.int64)[:, None] * x_n + c[None, :]
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * scale


@triton.jit
def _row(row_ptr, c, scale, C):
    return tl.load(row_ptr + c, mask=c < C, other=0.0).to(tl.float32) * scale


@triton.jit
def _compared(x, row, PRODUCT: tl.constexpr):
    """Of every token with one row: their product, or their squared distance, by differences."""
    difference = x - row[None, :]
    return tl.sum(x * row[None, :] if PRODUCT else difference * difference, axis=1)


@triton.jit
def _compare(
    x_ptr, x_n, row_ptr, out_ptr, begin, end, scale, N, C,
    BM: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr, PRODUCT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens ``begin`` to ``end`` with one row, into ``out`` ``[N]``. The inner loop loads ahead."""
    if WHOLE:  # a row is one block
        c = tl.arange(0, BC)
        row = _row(row_ptr, c, scale, C)
        for start in tl.range(begin, end, BM, num_stages=STAGES):
            n = start + tl.arange(0, BM)
            tl.store(out_ptr + n, _compared(_tokens(x_ptr, x_n, n, c, scale, N, C), row, PRODUCT), mask=n < N)
    else:
        for start in tl.range(begin, end, BM):
            n = start + tl.arange(0, BM)
            total = tl.zeros([BM], tl.float32)
            for column in tl.range(0, C, BC, num_stages=STAGES):
                c = column + tl.arange(0, BC)
                row = _row(row_ptr, c, scale, C)
                total += _compared(_tokens(x_ptr, x_n, n, c, scale, N, C), row, PRODUCT)
            tl.store(out_ptr + n, total, mask=n < N)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N"])
def statistics(
    x_ptr, mean_ptr, peaks_ptr, x_b, x_n, weight, N, C, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Grid (column tiles, B): mean over tokens, and largest size, of each column, ``[B, C]``.

    ``weight`` is a power of two, at most 1 / N, so that the sum does not overflow.
    """
    image = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x_ptr += image * x_b
    total = tl.zeros([BC], tl.float32)
    peak = tl.zeros([BC], tl.float32)
    for start in tl.range(0, N, BN):
        x = _tokens(x_ptr, x_n, start + tl.arange(0, BN), c, 1.0, N, C)
        total += tl.sum(x * weight, axis=0)
        peak = tl.maximum(peak, tl.max(tl.abs(x), axis=0))
    count = tl.zeros([BC], tl.float32) + N.to(tl.float32) * weight
    mean = total / count  # whose last bit may be wrong: two tokens may be as near the mean
    mean += tl.fma(-mean, count, total) / count
    tl.store(mean_ptr + image * C + c, mean, mask=c < C)
    tl.store(peaks_ptr + image * C + c, peak, mask=c < C)


@triton.jit(do_not_specialize=["room", "N"])
def central(
    x_ptr, mean_ptr, peaks_ptr, keys_ptr, scale_ptr, x_b, x_n, room, N, C,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): each tile's key of the token nearest the mean, into ``keys`` ``[2, B, room]``;
    and the ``scale`` ``[B]``."""
    image = tl.program_id(1).to(tl.int64)
    scale = _scale(peaks_ptr + image * C, C)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    distance = tl.zeros([BM], tl.float32)
    for start in tl.range(0, C, BC):
        c = start + tl.arange(0, BC)
        x = _tokens(x_ptr + image * x_b, x_n, n, c, scale, N, C)
        distance += _compared(x, _row(mean_ptr + image * C, c, scale, C), False)
    tl.store(_half(keys_ptr, 0, room) + tl.program_id(0), tl.max(_key(-_order(distance), n, N), axis=0))
    tl.store(scale_ptr + image, scale, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["first", "last", "span", "starts", "room", "N", "keep"])
def farthest(
    x_ptr, scale_ptr, distance_ptr, nearest_ptr, keys_ptr, order_ptr, start_ptr,
    x_b, x_n, first, last, span, starts, room, N, keep, C,
    BM: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Grid (spans, B): steps ``first`` to ``last``, one if the image has several spans of tokens.

    Step i chooses the i-th token into ``order`` ``[B, keep]``, and, unless it is the last, takes it into
    account: squared ``distance`` of each token to it, and ``nearest`` of all, ``[B, N]`` (-1 of kept tokens).
    Best tokens are in ``keys`` ``[2, B, room]``, one of each span: steps read one half and write the other.
    The first is chosen from ``starts`` keys. Where tokens are GIVEN in ``start`` ``[B, keep]``, they are
    taken instead of chosen.
    """
    image = tl.program_id(1).to(tl.int64)
    x_ptr += image * x_b
    distance_ptr += image * N
    nearest_ptr += image * N
    scale = tl.load(scale_ptr + image)
    begin = tl.program_id(0) * span
    for i in tl.range(first, last):
        token = _token(_best(_half(keys_ptr, i, room), tl.where(i > 0, tl.num_programs(0), starts), BT))
        if GIVEN:
            given = tl.load(start_ptr + image * keep + i)
            token = tl.where((given >= 0) & (given < N), given.to(tl.int32), token)
        tl.store(order_ptr + image * keep + i, token.to(tl.int64), mask=tl.program_id(0) == 0)
        end = tl.where(i < keep - 1, tl.minimum(begin + span, N), begin)
        row_ptr = x_ptr + token.to(tl.int64) * x_n
        _compare(x_ptr, x_n, row_ptr, distance_ptr, begin, end, scale, N, C, BM, BC, WHOLE, False, STAGES)
        tl.debug_barrier()  # read by other threads than wrote it
        best = tl.full([BT], -0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in tl.range(begin, end, BT):
            n = start + tl.arange(0, BT)
            distance = tl.load(distance_ptr + n, mask=n < end, other=0.0)
            nearest = tl.load(nearest_ptr + n, mask=(n < end) & (i > 0), other=float("inf"))
            nearest = tl.where(distance < nearest, distance, nearest)  # NaN is never nearer
            # Below any distance, so that even copies of what is kept come before it.
            nearest = tl.where(n == token, -1.0, nearest)
            tl.store(nearest_ptr + n, nearest, mask=n < end)
            best = tl.maximum(best, _key(_order(nearest), n, end))
        tl.store(_half(keys_ptr, i + 1, room) + tl.program_id(0), tl.max(best, axis=0))
        tl.debug_barrier()  # the same, in the next step


@triton.jit(do_not_specialize=["N"])
def units(
    x_ptr, peaks_ptr, units_ptr, scale_ptr, x_b, x_n, N, C, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Grid (token tiles, B): one over each scaled token's norm, ``[B, N]``, and the ``scale`` ``[B]``."""
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0)
    scale = _scale(peaks_ptr + image * C, C)
    n = at * BM + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(0, C, BC):
        x = _tokens(x_ptr + image * x_b, x_n, n, start + tl.arange(0, BC), scale, N, C)
        total += tl.sum(x * x, axis=1)
    tl.store(units_ptr + image * N + n, 1.0 / tl.maximum(tl.sqrt(total), 1e-12), mask=n < N)
    tl.store(scale_ptr + image, scale, mask=at == 0)


@triton.jit(do_not_specialize=["first", "last", "span", "room", "N", "keep"])
def volume(
    x_ptr, units_ptr, scale_ptr, product_ptr, left_ptr, factor_ptr, keys_ptr, order_ptr,
    x_b, x_n, first, last, span, room, N, keep, C,
    BM: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """As ``farthest``, with each token's ``product`` with the chosen one, the squared volume ``left`` that it
    would add, both ``[B, N]``, and the Cholesky ``factor`` ``[B, keep, N]``, a row a step. The first is token
    0."""
    image = tl.program_id(1).to(tl.int64)
    x_ptr += image * x_b
    units_ptr += image * N
    product_ptr += image * N
    left_ptr += image * N
    factor_ptr += image * keep * N
    scale = tl.load(scale_ptr + image)
    begin = tl.program_id(0) * span
    for i in tl.range(first, last):
        chosen = _best(_half(keys_ptr, i, room), tl.where(i > 0, tl.num_programs(0), 0), BT)
        token = tl.where(i > 0, _token(chosen), 0)
        added = tl.where(i > 0, (chosen >> 32).to(tl.int32).to(tl.float32, bitcast=True), 1.0)
        pivot = tl.sqrt(tl.maximum(added, EPS))
        tl.store(order_ptr + image * keep + i, token.to(tl.int64), mask=tl.program_id(0) == 0)
        end = tl.where(i < keep - 1, tl.minimum(begin + span, N), begin)
        row_ptr = x_ptr + token.to(tl.int64) * x_n
        _compare(x_ptr, x_n, row_ptr, product_ptr, begin, end, scale, N, C, BM, BC, WHOLE, True, STAGES)
        tl.debug_barrier()  # read by other threads than wrote it
        unit = tl.load(units_ptr + token)
        best = tl.full([BT], -0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in tl.range(begin, end, BT):
            n = start + tl.arange(0, BT)
            known = tl.zeros([BT], tl.float32)
            for step in tl.range(0, i, BL):
                k = step + tl.arange(0, BL)
                own = tl.load(factor_ptr + k.to(tl.int64) * N + token, mask=k < i, other=0.0)
                known += tl.sum(_tokens(factor_ptr, N, k, n, 1.0, i, end) * own[:, None], axis=0)
            product = tl.load(product_ptr + n, mask=n < end, other=0.0)
            similarity = product * unit * tl.load(units_ptr + n, mask=n < end, other=0.0)
            direction = (similarity - known) / pivot
            tl.store(factor_ptr + tl.cast(i, tl.int64) * N + n, direction, mask=n < end)
            left = tl.load(left_ptr + n, mask=(n < end) & (i > 0), other=1.0)
            rest = left - direction * direction
            rest = tl.where(rest >= EPS, rest, 0.0)  # NaN is no volume
            left = tl.where((left < 0.0) | (n == token), -1.0, rest)
            tl.store(left_ptr + n, left, mask=n < end)
            best = tl.maximum(best, _key(_order(left), n, end))
        tl.store(_half(keys_ptr, i + 1, room) + tl.program_id(0), tl.max(best, axis=0))
        tl.debug_barrier()  # the same, in the next step


# ------------------------------------------------------------------------------------------------- launchers


class _Cut(NamedTuple):
    """How an image's steps are shared out."""

    span: int  # tokens of a program
    programs: int
    launches: tuple[tuple[int, int], ...]  # first step and end
    whole: bool  # whether a token is one block


def farthest_points(
    x: torch.Tensor, keep: int, small: int = SMALL, start: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, keep]`` in the order of choice.

    Args:
        x: ``[B, N, C]``.
        keep: tokens to keep.
        small: numbers N * C that one program goes through.
        start: ``[B, keep]`` contiguous: what is kept already, and -1.
    """
    x = _aligned(x)
    batch, tokens, width = x.shape
    arch, device = _arch(x), x.device
    mean, peaks = _statistics(x, arch)
    tiles = tile("diversity.farthest", arch, "any")
    cut = _cut(x, keep, small, tiles)
    starts = triton.cdiv(tokens, tiles["BM"])
    room = max(starts, cut.programs)
    keys = torch.empty(2, batch, room, dtype=torch.int64, device=device)
    scale = torch.empty(batch, dtype=torch.float32, device=device)
    launch(
        central, (starts, batch), device,
        x, mean, peaks, keys, scale, *_strides(x), room, tokens, width,
        **{name: tiles[name] for name in ("BM", "BC", "num_warps", "num_stages")},
    )  # fmt: skip
    distance, nearest = (torch.empty(batch, tokens, dtype=torch.float32, device=device) for _ in range(2))
    order = torch.empty(batch, keep, dtype=torch.int64, device=device)
    for first, last in cut.launches:
        launch(
            farthest, (cut.programs, batch), device,
            x, scale, distance, nearest, keys, order, order if start is None else start, *_strides(x),
            first, last, cut.span, starts, room, tokens, keep, width,
            WHOLE=cut.whole, STAGES=tiles["num_stages"], GIVEN=start is not None, **tiles,
        )  # fmt: skip
    return order


def largest_volume(x: torch.Tensor, keep: int, small: int = SMALL) -> torch.Tensor:
    """The same."""
    x = _aligned(x)
    batch, tokens, width = x.shape
    arch, device = _arch(x), x.device
    _, peaks = _statistics(x, arch)
    scale = torch.empty(batch, dtype=torch.float32, device=device)
    product, left, unit = (torch.empty(batch, tokens, dtype=torch.float32, device=device) for _ in range(3))
    tiles = tile("diversity.units", arch, "any")
    launch(
        units, (triton.cdiv(tokens, tiles["BM"]), batch), device,
        x, peaks, unit, scale, *_strides(x), tokens, width, **tiles,
    )  # fmt: skip
    tiles = tile("diversity.volume", arch, "any")
    cut = _cut(x, keep, small, tiles)
    keys = torch.empty(2, batch, cut.programs, dtype=torch.int64, device=device)
    factor = torch.empty(batch, keep, tokens, dtype=torch.float32, device=device)
    order = torch.empty(batch, keep, dtype=torch.int64, device=device)
    for first, last in cut.launches:
        launch(
            volume, (cut.programs, batch), device,
            x, unit, scale, product, left, factor, keys, order, *_strides(x),
            first, last, cut.span, cut.programs, tokens, keep, width,
            WHOLE=cut.whole, STAGES=tiles["num_stages"], EPS=EPS, **tiles,
        )  # fmt: skip
    return order


def _cut(x: torch.Tensor, keep: int, small: int, tiles: Tile) -> _Cut:
    _, tokens, width = x.shape
    whole = width <= tiles["BC"]
    if tokens * width <= small:
        return _Cut(tokens, 1, ((0, keep),), whole)
    programs = triton.cdiv(tokens, tiles["BM"])
    return _Cut(tiles["BM"], programs, tuple((i, i + 1) for i in range(keep)), whole)


def _statistics(x: torch.Tensor, arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and largest size of each column, ``[B, C]``."""
    batch, tokens, width = x.shape
    tiles = tile("diversity.statistics", arch, "any")
    mean, peaks = (torch.empty(batch, width, dtype=torch.float32, device=x.device) for _ in range(2))
    weight = 1.0 / triton.next_power_of_2(tokens)
    launch(
        statistics, (triton.cdiv(width, tiles["BC"]), batch), x.device,
        x, mean, peaks, *_strides(x), weight, tokens, width, **tiles,
    )  # fmt: skip
    return mean, peaks


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy, unless rows lie so that they load in wide pieces; columns of zeros change no choice."""
    width = x.shape[2]
    if x.stride(2) == 1 and x.stride(1) % 16 == 0 and width % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -width % 16)).contiguous()


def _strides(x: torch.Tensor) -> list[int]:
    """Of images and tokens. Of one alone it is chance, which must not decide what is compiled."""
    return [0 if x.shape[dim] == 1 else x.stride(dim) for dim in (0, 1)]


def _arch(x: torch.Tensor) -> str:
    arch = architecture(x.device)
    assert arch is not None
    return arch
