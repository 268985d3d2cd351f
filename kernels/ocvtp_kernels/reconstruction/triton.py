# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""The area-weighted reconstruction error as Triton kernels: two or three launches forward, one backward.

``token_errors`` reads reconstruction and features, once, and the attention: each token's squared error, and
the slot that owns it. ``token_weights`` counts owners, which gives the slots' weights, and reads the
attention again: each token's weight. A small map's image is one program's work there, which leaves its loss;
else every token tile counts for itself (2880 owners, about twelve atomics in shared memory for each thread,
against the launch of a kernel that counts them once) and ``total_loss`` adds up. ``gradients`` reads
reconstruction and features once more.

No atomics on floats, and launches are chosen by N and K alone: sums run in the same order whatever the batch.

Floor: B (2 N C + 2 K N) numbers read, so at (B, N, C, K) = (12, 2880, 1024, 640), 16-bit tokens and a float32
map, 142 + 177 MB forward, 95 us at 3.35 TB/s, and 212 MB backward, 63 us. At (12, 576, 1024, 64) 28 + 4 MB,
9.5 us; at B=1 it is latency, 0.8 us of reading in two launches.
"""

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import tile
from ocvtp_kernels.reconstruction.reference import EPS

_EPS = tl.constexpr(EPS)
# Slots x tokens up to which one program weighs an image alone: it reads them in 3 us, what a launch costs.
_WHOLE_LIMIT = 65536


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def _block(ptr, row, column, rows, columns, stride_row, stride_column, other):
    """``[rows of row, columns of column]`` as float32; ``other`` outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + offsets, mask=inside, other=other).to(tl.float32)


@triton.jit
def _raised(total):
    """A sum of weights at its floor or above. NaN stays NaN, which ``tl.maximum`` would hide."""
    return tl.where(total < _EPS, _EPS, total)


@triton.jit
def _slot_weights(
    owner_ptr, slots_ptr, N, K, power, BT: tl.constexpr, KP: tl.constexpr, EXCLUDE: tl.constexpr
):
    """Stores every slot's weight, not yet normalised, for this program to read back; returns their mean."""
    bins = tl.arange(0, KP)
    total = tl.zeros([KP], tl.float32)
    number = tl.zeros([KP], tl.int32)
    for first in tl.range(0, K, KP):
        counts = tl.zeros([KP], tl.int32)
        outside = tl.zeros([BT], tl.int32)
        for start in tl.range(0, N, BT):
            n = start + tl.arange(0, BT)
            owner = tl.load(owner_ptr + n, mask=n < N, other=-1) - first
            here = (owner >= 0) & (owner < KP)
            # Triton 3.3's histogram takes no mask: what is not here counts for bin 0 and is taken off again.
            counts += tl.histogram(tl.where(here, owner, 0), KP)
            outside += tl.where(here, 0, 1)
        counts -= tl.where(bins == 0, tl.sum(outside, axis=0), 0)
        area = counts.to(tl.float32) / N
        weights = tl.exp2(0.0 - power * tl.log2(tl.where(area < _EPS, _EPS, area)))
        counted = first + bins < K
        if EXCLUDE:
            counted = counted & (counts > 0)
        weights = tl.where(counted, weights, 0.0)
        tl.store(slots_ptr + first + bins, weights, mask=first + bins < K)
        total += weights
        number += counted.to(tl.int32)
    return tl.sum(total, axis=0) / tl.sum(number, axis=0)


# -------------------------------------------------------------------------------------------------- kernels
# Specialised on whether sizes are multiples of 16: a mask up to any other size would split wide loads.


@triton.jit
def token_errors(
    y_ptr, x_ptr, map_ptr, owner_ptr, error_ptr,
    y_b, y_n, y_c, x_b, x_n, x_c, map_b, map_k, map_n, N, K, C,
    BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): slot that attends to each token most ``[B, N]`` int32, the lowest if several do;
    mean squared error of each token ``[B, N]`` float32."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.arange(0, BK)
    most = tl.full([BK, BN], float("-inf"), tl.float32)
    slots = tl.zeros([BK, BN], tl.int32) + row[:, None]
    for start in tl.range(0, K, BK):
        values = _block(map_ptr + image * map_b, start + row, n, K, N, map_k, map_n, float("-inf"))
        values = tl.where(values == values, values, float("inf"))  # NaN as the largest, never beyond K
        slots = tl.where(values > most, start + row[:, None], slots)
        most = tl.maximum(most, values)
    best = most == tl.max(most, axis=0)[None, :]
    owner = tl.min(tl.where(best, slots, K), axis=0)
    tl.store(owner_ptr + image * N + n, owner, mask=n < N)
    squares = tl.zeros([BN, BC], tl.float32)
    for start in tl.range(0, C, BC):
        c = start + tl.arange(0, BC)
        y = _block(y_ptr + image * y_b, n, c, N, C, y_n, y_c, 0.0)
        x = _block(x_ptr + image * x_b, n, c, N, C, x_n, x_c, 0.0)
        squares += (y - x) * (y - x)
    tl.store(error_ptr + image * N + n, tl.sum(squares, axis=1) / C, mask=n < N)


@triton.jit
def token_weights(
    map_ptr, owner_ptr, error_ptr, slots_ptr, weights_ptr, loss_ptr, total_ptr,
    map_b, map_k, map_n, power, cap, N, K,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr,
    EXCLUDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid (G, B): weight of each token ``[B, N]``, their sum, and that of weight times error, ``[B, G]``.

    WHOLE: G is 1, and the second sum is divided by the first: the loss. Else a program has one token tile.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    slots_ptr += (image * programs + program) * K
    mean = _slot_weights(owner_ptr + image * N, slots_ptr, N, K, power, BT, KP, EXCLUDE)
    tl.debug_barrier()  # this block's own weights are read back below
    weighted = tl.zeros([BN], tl.float32)
    total = tl.zeros([BN], tl.float32)
    for first in tl.range(program * BN, N, programs * BN):
        n = first + tl.arange(0, BN)
        products = tl.zeros([BK, BN], tl.float32)
        for start in tl.range(0, K, BK):
            k = start + tl.arange(0, BK)
            slots = tl.load(slots_ptr + k, mask=k < K, other=0.0) / mean
            slots = tl.where(slots > cap, cap, slots)
            values = _block(map_ptr + image * map_b, k, n, K, N, map_k, map_n, 0.0)
            products += values * slots[:, None]
        # Where there is no token, an infinite weight would make NaN of zero.
        weights = tl.where(n < N, tl.sum(products, axis=0), 0.0)
        tl.store(weights_ptr + image * N + n, weights, mask=n < N)
        total += weights
        weighted += weights * tl.load(error_ptr + image * N + n, mask=n < N, other=0.0)
    sum_weighted = tl.sum(weighted, axis=0)
    sum_total = tl.sum(total, axis=0)
    if WHOLE:
        sum_weighted = sum_weighted / _raised(sum_total)
    tl.store(loss_ptr + image * programs + program, sum_weighted)
    tl.store(total_ptr + image * programs + program, sum_total)


@triton.jit(do_not_specialize=["G"])
def total_loss(weighted_ptr, part_ptr, loss_ptr, total_ptr, G, BT: tl.constexpr):
    """Grid (B,): the sums of an image's ``G`` programs, and its loss."""
    image = tl.program_id(0).to(tl.int64)
    weighted = tl.zeros([BT], tl.float32)
    total = tl.zeros([BT], tl.float32)
    for start in tl.range(0, G, BT):
        g = start + tl.arange(0, BT)
        weighted += tl.load(weighted_ptr + image * G + g, mask=g < G, other=0.0)
        total += tl.load(part_ptr + image * G + g, mask=g < G, other=0.0)
    sum_total = tl.sum(total, axis=0)
    tl.store(loss_ptr + image, tl.sum(weighted, axis=0) / _raised(sum_total))
    tl.store(total_ptr + image, sum_total)


@triton.jit(do_not_specialize=["N"])
def gradients(
    grad_ptr, y_ptr, x_ptr, weights_ptr, total_ptr, grad_y_ptr, grad_x_ptr,
    grad_b, y_b, y_n, y_c, x_b, x_n, x_c, N, C,
    BN: tl.constexpr, BC: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, channel tiles, B): gradients of the losses with respect to ``y`` and ``x``, those
    of the two that are wanted, contiguous ``[B, N, C]``."""
    image = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = _raised(tl.load(total_ptr + image))
    scale = 2.0 * tl.load(grad_ptr + image * grad_b).to(tl.float32) / (C * total)
    weights = tl.load(weights_ptr + image * N + n, mask=n < N, other=0.0) * scale
    y = _block(y_ptr + image * y_b, n, c, N, C, y_n, y_c, 0.0)
    x = _block(x_ptr + image * x_b, n, c, N, C, x_n, x_c, 0.0)
    gradient = (y - x) * weights[:, None]
    inside = (n < N)[:, None] & (c < C)[None, :]
    offsets = (image * N + n)[:, None] * C + c[None, :]
    if Y:
        tl.store(grad_y_ptr + offsets, gradient.to(grad_y_ptr.dtype.element_ty), mask=inside)
    if X:
        tl.store(grad_x_ptr + offsets, (0.0 - gradient).to(grad_x_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------- launchers


def area_weighted_mse(
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    slot_attention: torch.Tensor,
    exclude_empty: bool,
    power: float,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses ``[B]``, weights of tokens ``[B, N]`` and their sums ``[B]``, all float32."""
    batch, tokens, width = reconstruction.shape
    slots = slot_attention.shape[1]
    device = reconstruction.device
    arch = architecture(device)
    assert arch is not None
    owner = torch.empty(batch, tokens, dtype=torch.int32, device=device)
    errors = torch.empty(batch, tokens, dtype=torch.float32, device=device)
    cut = tile("reconstruction.token_errors", arch, "any")
    launch(
        token_errors, (triton.cdiv(tokens, cut["BN"]), batch), device,
        reconstruction, features, slot_attention, owner, errors,
        *_strides(reconstruction), *_strides(features), *_strides(slot_attention), tokens, slots, width,
        **cut,
    )  # fmt: skip
    whole = slots * tokens <= _WHOLE_LIMIT
    cut = tile("reconstruction.token_weights", arch, "whole" if whole else "tiles")
    programs = 1 if whole else triton.cdiv(tokens, cut["BN"])
    of_slots = torch.empty(batch, programs, slots, dtype=torch.float32, device=device)
    of_tokens = torch.empty(batch, tokens, dtype=torch.float32, device=device)
    weighted = torch.empty(batch, programs, dtype=torch.float32, device=device)
    parts = torch.empty(batch, programs, dtype=torch.float32, device=device)
    launch(
        token_weights, (programs, batch), device,
        slot_attention, owner, errors, of_slots, of_tokens, weighted, parts,
        *_strides(slot_attention), float(power), float(cap), tokens, slots,
        EXCLUDE=exclude_empty, WHOLE=whole, **cut,
    )  # fmt: skip
    if whole:
        return weighted.view(batch), of_tokens, parts.view(batch)
    loss = torch.empty(batch, dtype=torch.float32, device=device)
    total = torch.empty(batch, dtype=torch.float32, device=device)
    cut = tile("reconstruction.total_loss", arch, "any")
    launch(total_loss, (batch,), device, weighted, parts, loss, total, programs, **cut)
    return loss, of_tokens, total


def area_weighted_mse_backward(
    grad: torch.Tensor,
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    wants_reconstruction: bool,
    wants_features: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``reconstruction`` and ``features``, contiguous; empty where not wanted."""
    batch, tokens, width = reconstruction.shape
    device = reconstruction.device
    arch = architecture(device)
    assert arch is not None
    cut = tile("reconstruction.gradients", arch, "any")
    out = []
    for tensor, wanted in ((reconstruction, wants_reconstruction), (features, wants_features)):
        shape = (batch, tokens, width) if wanted else (0,)
        out.append(torch.empty(*shape, dtype=tensor.dtype, device=device))
    launch(
        gradients, (triton.cdiv(tokens, cut["BN"]), triton.cdiv(width, cut["BC"]), batch), device,
        grad, reconstruction, features, weights, total, *out,
        *_strides(grad), *_strides(reconstruction), *_strides(features), tokens, width,
        Y=wants_reconstruction, X=wants_features, **cut,
    )  # fmt: skip
    return out[0], out[1]


def _strides(tensor: torch.Tensor) -> list[int]:
    """0 for a dimension of one element: code, and with it bits, must not depend on what is said there."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
