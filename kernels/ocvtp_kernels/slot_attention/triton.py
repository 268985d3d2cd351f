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

from ocvtp_kernels._jit import after_launches_before
from ocvtp_kernels._launch import launch
from ocvtp_kernels.slot_attention import loop
from ocvtp_kernels.slot_attention.cut import Cut, arithmetic, padded_slots
from ocvtp_kernels.slot_attention.folded import FoldedWeights, SlotStart
from ocvtp_kernels.slot_attention.reference import NORM_EPS
from ocvtp_kernels.slot_attention.shapes import Assigned, TopTokens, slot_class, token_tiles
from ocvtp_kernels.slot_attention.steps import (
    PART,
    attend_tile,
    gru_tile,
    linear_tile,
    padded_parts,
    update_tile,
)

# Rows of the encoder's hidden layer in memory at a time: 268 MB at 2048 columns of 16 bit.
_MOST_ROWS = 65536


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N", "WORDS"])
def normalise(
    x_ptr, y_ptr, words_ptr, x_b, N, C, WORDS, eps, BR: tl.constexpr, CP: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid (row tiles, B): LayerNorm without affine part of ``[B, N, C]``, rows one after another. The first
    program also sets ``words`` ``[WORDS]``, int32, to zero: counters of the launch that follows."""
    after_launches_before(PDL)
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
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for start in tl.range(0, WORDS, 128):
            i = start + tl.arange(0, 128)
            tl.store(words_ptr + i, tl.zeros([128], tl.int32), mask=i < WORDS)


@triton.jit(do_not_specialize=["R"])
def linear(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, half_ptr, given_ptr, left_ptr, dot_ptr, dots_ptr,
    R, OUT, IN, eps,
    BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, PP: tl.constexpr,
    EVEN: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMN: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles): ``x`` ``[R, IN]`` -> ``x W^T + bias``, then GELU, then the residual added, ``[R, OUT]``.

    NORM: ``x`` is normalised first; ``W`` is centred, so only the variance is needed, and ``given``, what was
    left of the rows, tells it. RESIDUAL: leaves the same of its own rows, ``left`` ``[3, OUT / 16, R]``, with
    each 16 columns' dot product with ``dot``, and HALF, a copy in the dtype of the products. COLUMN: no bias,
    but what such dot products in ``given`` come to, times 1 / standard deviation, in ``dots`` ``[R]``.
    """
    after_launches_before(PDL)
    # GROUP row tiles go through all columns together, so that their rows and the weights stay in L2.
    tiles = tl.cdiv(OUT, BO)
    program = tl.program_id(0)
    group = program // (GROUP * tiles)
    size = tl.minimum(tl.cdiv(R, BM) - group * GROUP, GROUP)
    inner = program - group * GROUP * tiles
    linear_tile(
        group * GROUP + inner % size, inner // size,
        x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, half_ptr, given_ptr, left_ptr, dot_ptr, dots_ptr,
        R, OUT, IN, eps,
        BM, BO, BC, PP, EVEN, NORM, GELU, RESIDUAL, COLUMN, HALF, FAST, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["START", "N", "K"])
def attend(
    z_ptr, q_ptr, bias_ptr, p_ptr, sums_ptr, keys_ptr, largest_ptr, finite_ptr, START, N, K, KS, D,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    LAST: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): softmax over slots of ``queries . z + bias``, of START = 1 or B images' queries.

    ONE: the tile holds all slots. Otherwise a pass for the sum and a pass that computes the logits again.
    Not LAST: ``p`` ``[B, N, KS]`` times SCALE, zero from slot K on, and each tile's sums of it,
    ``[B, tiles, KS]``. LAST: ``keys`` ``[B, tiles, K]``, integers that order like (attention, lower token),
    each token's ``largest`` attention ``[B, N]``, and whether it is ``finite`` ``[B, N]``.
    """
    after_launches_before(PDL)
    image = tl.program_id(1)
    attend_tile(
        tl.program_id(0), tl.num_programs(0), image.to(tl.int64), tl.minimum(image, START - 1).to(tl.int64),
        z_ptr, q_ptr, bias_ptr, p_ptr, sums_ptr, keys_ptr, largest_ptr, finite_ptr, N, K, KS, D,
        BM, BK, BC, EVEN, ONE, LAST, SCALE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "K", "T"])
def update(
    p_ptr, sums_ptr, z_ptr, u_ptr, mass_ptr, N, K, KS, D, T, eps,
    BK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SHARE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles, slot tiles, B): each slot's weighted mean of the tokens, ``u`` ``[B, K, D]``, and
    its ``mass`` ``[B, K]``: the sum S of its attention, or, with SHARE, S / (S + eps). Tokens are added in
    their order."""
    after_launches_before(PDL)
    update_tile(
        tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64),
        p_ptr, sums_ptr, z_ptr, u_ptr, mass_ptr, N, K, KS, D, T, eps, BK, BN, BD, SHARE, SCALE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "START"])
def gru(
    u_ptr, mass_ptr, s_ptr, half_s_ptr, gates_ptr, wi_ptr, wh_ptr, bi_ptr, bm_ptr, bh_ptr,
    y_ptr, half_ptr, parts_ptr, R, START, D,
    BM: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, GIVEN: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column tiles): one GRU cell, ``u`` and slots ``s`` ``[R, D]`` -> new slots, float32.

    ``half_s`` is a copy of ``s`` in the dtype of the products. Leaves such a copy of the new ones (HALF), and
    ``parts`` ``[2, D / 16, R]`` of their rows.

    GIVEN: the hidden side of the gates is a constant, ``[START, 3D]``, and so are the slots, ``[START, D]``;
    row r takes row r mod START of them. ``bm`` is the part of the input bias that goes with the mass.
    """
    after_launches_before(PDL)
    gru_tile(
        tl.program_id(0), tl.program_id(1), u_ptr, mass_ptr, s_ptr, half_s_ptr, gates_ptr, wi_ptr, wh_ptr,
        bi_ptr, bm_ptr, bh_ptr, y_ptr, half_ptr, parts_ptr, R, START, D,
        BM, BJ, BC, EVEN, GIVEN, HALF, PRECISION,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- launchers


class Slots(NamedTuple):
    """Slots ``[B, K, D]`` between two steps."""

    exact: torch.Tensor  # float32
    operand: torch.Tensor  # in the dtype of the products: ``exact`` itself, or a copy
    parts: torch.Tensor  # [2 or 3, D / 16, B K] float32: what was left of their rows, see steps.py


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
    batch, slots = features.shape[0], start.slots.shape[1]
    found = _room_for_results(batch, slots, features.shape[1], cut, into)
    if not return_attention and loop.serves(batch, slots, num_iters, cut):
        counters = loop.counters(batch, slots, cut)
        z = _encode(features, w, cut, normalised, counters)
        loop.assign(z, start, w, num_iters, eps, counters, found, cut)
        return found
    z = _encode(features, w, cut, normalised)
    queries, bias = start.queries, start.query_bias
    entering = None
    for _ in range(num_iters - 1):
        weights, sums = attention_weights(z, queries, bias, cut)
        entering = _update(weights, sums, z, start, entering, w, eps, cut)
        queries, bias = _queries(entering, w, cut)
    if return_attention:  # to look at; not worth kernels of its own
        weights, _ = attention_weights(z, queries, bias, cut, plain=True)
        found = found._replace(attention=weights[:, :, :slots].transpose(1, 2).contiguous())
    _launch_attend(z, queries, bias, cut, found=found)
    return found


def normalise_into(features: torch.Tensor, out: torch.Tensor) -> None:
    """What :func:`assign` does first: ``features`` ``[B, N, C]``, normalised, into ``out``, contiguous.

    Its dtype is that of the products.
    """
    _normalise(features, out, arithmetic(out.device, out.dtype, False))


def _room_for_results(batch: int, slots: int, tokens: int, cut: Cut, into: TopTokens | None) -> Assigned:
    attention = torch.empty(0, dtype=torch.float32, device=cut.device)
    if into is not None:
        return Assigned(*into, attention)
    tiles = token_tiles(slots, tokens, cut.device, cut.dtype)
    return Assigned(
        keys=torch.empty(batch, tiles, slots, dtype=torch.int64, device=cut.device),
        largest=torch.empty(batch, tokens, dtype=torch.float32, device=cut.device),
        finite=torch.empty(batch, tokens, dtype=torch.uint8, device=cut.device).view(torch.bool),
        attention=attention,
    )


def _encode(
    features: torch.Tensor,
    w: FoldedWeights,
    cut: Cut,
    normalised: bool,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalised encoder MLP, ``[B, N, C] -> [B, N, D]``, in groups of images that bound the hidden layer.

    ``counters`` are zero afterwards.
    """
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
        _normalise(encoded, z[first : first + step], cut, counters)
    return z


def _normalise(x: torch.Tensor, y: torch.Tensor, cut: Cut, counters: torch.Tensor | None = None) -> None:
    size = cut.normalise
    batch, tokens, width = x.shape
    # How loads are split over threads, and sums with them, must not depend on how the features lie in memory.
    if x.stride(2) != 1 or x.stride(1) != width:
        x = x.contiguous()
    padded = triton.next_power_of_2(width)
    rows = max(1, size["SIZE"] // padded)
    launch(
        normalise, (triton.cdiv(tokens, rows), batch), cut.device,
        x, y, y if counters is None else counters, x.stride(0), tokens, width,
        0 if counters is None else counters.numel(), NORM_EPS,
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
    given: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    left: Slots | None = None,
    dot: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
    GELU: bool = False,
) -> None:
    """``y = x W^T`` and what goes with it: ``given`` of the rows of ``x``, if they are to be normalised;
    ``left`` of those of ``y``, with products with ``dot``; ``dots``, where their sums go."""
    out, width = weight.shape
    rows = y.numel() // out
    size = cut.of("linear", role, rows)
    grid = (triton.cdiv(rows, size["BM"]) * triton.cdiv(out, size["BO"]),)
    # What a variant does not use is not there; any tensor stands for it.
    optional = (
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        y if left is None else left.operand,
        y if given is None else given,
        y if left is None else left.parts,
        x if dot is None else dot,
        y if dots is None else dots,
    )
    launch(
        linear, grid, cut.device, x, weight, *optional, rows, out, width, NORM_EPS,
        PP=1 if given is None else padded_parts(width), EVEN=width % size["BC"] == 0,
        NORM=given is not None, GELU=GELU, RESIDUAL=residual is not None, COLUMN=dots is not None,
        HALF=cut.copies, FAST=cut.dtype == torch.float16, PRECISION=cut.precision, **size,
    )  # fmt: skip


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
    starts, slots, _ = queries.shape
    size = cut.of("attend", slot_class(slots))
    # What a variant does not write is not there; any tensor stands for it.
    results = (z, z, z)
    if found is not None:
        results = (found.keys, found.largest, found.finite.view(torch.uint8))
    assert bias.shape[0] == starts  # one for all images, or one for each
    launch(
        attend, (triton.cdiv(tokens, size["BM"]), batch), cut.device,
        z, queries, bias, z if p is None else p, z if sums is None else sums, *results,
        starts, tokens, slots, padded_slots(slots), width,
        EVEN=width % size["BC"] == 0, ONE=slots <= size["BK"], LAST=found is not None, SCALE=cut.scale,
        PRECISION=cut.precision, **size,
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
    start: SlotStart,
    slots: Slots | None,
    w: FoldedWeights,
    eps: float,
    cut: Cut,
) -> Slots:
    """Weighted means, GRU and MLP: the next slots. ``slots``: those that enter, unless it is the start."""
    batch, count, width = z.shape[0], start.slots.shape[1], z.shape[2]
    rows = batch * count
    mean = torch.empty(batch, count, width, dtype=cut.dtype, device=cut.device)
    mass = torch.empty(batch, count, dtype=torch.float32, device=cut.device)
    weighted_mean(p, sums, z, mean, mass, eps, cut, SHARE=True)
    entered = _room(batch, count, width, 2, cut)
    size = cut.of("gru", "any", rows)
    hidden_side = (start.slots, mean, start.gates_hidden) if slots is None else (slots[0], slots[1], mean)
    launch(
        gru, (triton.cdiv(rows, size["BM"]), triton.cdiv(width, size["BJ"])), cut.device,
        mean, mass, *hidden_side, w.gru_input_weight, w.gru_hidden_weight,
        w.gru_input_bias, w.gru_mass_bias, w.gru_hidden_bias, *entered,
        rows, start.slots.shape[0] * count if slots is None else rows, width,
        EVEN=width % size["BC"] == 0, GIVEN=slots is None, HALF=cut.copies, PRECISION=cut.precision, **size,
    )  # fmt: skip
    hidden = torch.empty(rows, w.mlp_fc1_weight.shape[0], dtype=cut.dtype, device=cut.device)
    _linear(
        "mlp-1", entered.operand, w.mlp_fc1_weight, w.mlp_fc1_bias, hidden, cut,
        given=entered.parts, GELU=True,
    )  # fmt: skip
    left = _room(batch, count, width, 3, cut)
    _linear(
        "mlp-2", hidden, w.mlp_fc2_weight, w.mlp_fc2_bias, left.exact, cut,
        residual=entered.exact, left=left, dot=w.query_bias_weight,
    )  # fmt: skip
    return left


def _room(batch: int, count: int, width: int, parts: int, cut: Cut) -> Slots:
    exact = torch.empty(batch, count, width, dtype=torch.float32, device=cut.device)
    operand = exact
    if cut.copies:
        operand = torch.empty(batch, count, width, dtype=cut.dtype, device=cut.device)
    columns = triton.cdiv(width, PART)
    left = torch.empty(parts, columns, batch * count, dtype=torch.float32, device=cut.device)
    return Slots(exact, operand, left)


def _queries(slots: Slots, w: FoldedWeights, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """What the slots ask of the tokens, ``[B, K, D]``, and their bias ``[B, K]``."""
    batch, count, width = slots.exact.shape
    queries = torch.empty(batch, count, width, dtype=cut.dtype, device=cut.device)
    bias = torch.empty(batch, count, dtype=torch.float32, device=cut.device)
    _linear("queries", slots.operand, w.query_weight, None, queries, cut, given=slots.parts, dots=bias)
    return queries, bias
