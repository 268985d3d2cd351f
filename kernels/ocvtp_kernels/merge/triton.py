# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Merging tokens into kept ones as Triton kernels.

    token_mean, centre, assign (_nearest.py)            whose each token is
    line_up                                             tokens in the order of their owners, and their numbers
    average                                             each owner's mean
    spread                                              the gradient: each token's share of its owner's

Tokens are lined up first, so that a program reads those of its owner and no others: x is read once, in its
dtype, a token that is no number reaches one row, and a row's bits depend on its tokens alone, which are added
in their order, as the reference does. No atomics, and no matrix that is N x T.

Floor at (B, N, C, T) = (64, 576, 1024, 64) in float16, at 3.35 TB/s: average reads x, 75 MB, and writes 8 MB,
25 us; spread reads 8 MB and writes 75 MB, 25 us; line_up reads the owners twice, 0.3 MB, and is bound by its
launch. 38 million additions or divisions are nothing beside that. Finding owners: see _nearest.py.
"""

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._launch import launch
from ocvtp_kernels._nearest import assigned, centred
from ocvtp_kernels._tiles import tile

# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N", "T"])
def line_up(
    owner_ptr, order_ptr, first_ptr, mass_ptr, N, T, BT: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Grid (owner tiles, B): tokens by owner, each owner's in their order, ``[B, N]`` int32; where an owner's
    begin, ``[B, T]`` int32; how many they are, ``[B, T]`` float32. Tokens of no owner are left out."""
    image = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    place = tl.zeros([BT], tl.int32)
    count = tl.zeros([BT], tl.int32)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        owner = tl.load(owner_ptr + image * N + n, mask=n < N, other=-1)
        before = (owner[None, :] >= 0) & (owner[None, :] < t[:, None])
        place += tl.sum(before.to(tl.int32), axis=1)
        count += tl.sum((owner[None, :] == t[:, None]).to(tl.int32), axis=1)
    tl.store(first_ptr + image * T + t, place, mask=t < T)
    tl.store(mass_ptr + image * T + t, count.to(tl.float32), mask=t < T)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        owner = tl.load(owner_ptr + image * N + n, mask=n < N, other=-1)
        own = (owner[None, :] == t[:, None]) & (t < T)[:, None]
        position = place[:, None] + tl.cumsum(own.to(tl.int32), axis=1) - 1
        token = tl.zeros([BT, BN], tl.int32) + n[None, :]
        tl.store(order_ptr + image * N + position, token, mask=own)
        place += tl.sum(own.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["N", "T"])
def average(
    x_ptr, order_ptr, first_ptr, mass_ptr, rows_ptr, x_b, x_n, x_c, N, T, C,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (T, column tiles, B): mean of each owner's tokens of ``[B, N, C]``, any strides, ``[B, T, C]``.
    Sums run in the order of the tokens, whatever the layout: these are the reference's bits."""
    image = tl.program_id(2).to(tl.int64)
    row = image * T + tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    order_ptr += image * N + tl.load(first_ptr + row)
    mass = tl.load(mass_ptr + row)
    count = mass.to(tl.int32)
    total = tl.zeros([BC], tl.float32)
    x_ptr += image * x_b + c.to(tl.int64) * x_c
    for start in tl.range(0, count, BN):
        for step in tl.static_range(BN):  # BN rows are under way; one after the other is added
            i = start + step
            n = tl.load(order_ptr + tl.minimum(i, count - 1)).to(tl.int64)
            columns = tl.where(i < count, C, 0)
            total += tl.load(x_ptr + n * x_n, mask=c < columns, other=0.0).to(tl.float32)
    mean = tl.div_rn(total, tl.maximum(mass, 1.0) + tl.zeros([BC], tl.float32))
    tl.store(rows_ptr + row * C + c, mean.to(rows_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["N", "T"])
def spread(
    rows_ptr, owner_ptr, mass_ptr, x_ptr, rows_b, rows_t, rows_c, N, T, C,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): the transpose of the mean, ``[B, N, C]``: each token's owner's row of
    ``[B, T, C]``, any strides, over the owner's mass; zero for a token of no owner."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    owner = tl.load(owner_ptr + image * N + n, mask=n < N, other=-1)
    owned = (owner >= 0) & (owner < T)
    mass = tl.load(mass_ptr + image * T + owner, mask=owned, other=1.0)
    for start in tl.range(0, C, BC):
        c = start + tl.arange(0, BC)
        offsets = owner.to(tl.int64)[:, None] * rows_t + c.to(tl.int64)[None, :] * rows_c
        inside = owned[:, None] & (c < C)[None, :]
        row = tl.load(rows_ptr + image * rows_b + offsets, mask=inside, other=0.0).to(tl.float32)
        share = tl.div_rn(row, mass[:, None] + tl.zeros([BN, BC], tl.float32))
        to = (image * N + n)[:, None] * C + c[None, :]
        tl.store(x_ptr + to, share.to(x_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


# ------------------------------------------------------------------------------------------------- launchers


def nearest_kept(compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Owners ``[B, N]`` int64."""
    if mask is not None:
        mask = mask.contiguous()
    return assigned(centred(compare), indices.contiguous(), mask, torch.int64, distances=False)[0]


def lined_up(owner: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens in the order of their owners ``[B, N]``, where an owner's begin, and their number ``[B, keep]``.

    ``owner`` must be contiguous.
    """
    batch, tokens = owner.shape
    device = owner.device
    arch = architecture(device)
    assert arch is not None
    cut = tile("merge.line_up", arch, "any")
    order = torch.empty(batch, tokens, dtype=torch.int32, device=device)
    first = torch.empty(batch, keep, dtype=torch.int32, device=device)
    mass = torch.empty(batch, keep, dtype=torch.float32, device=device)
    launch(
        line_up, (triton.cdiv(keep, cut["BT"]), batch), device,
        owner, order, first, mass, tokens, keep, **cut,
    )  # fmt: skip
    return order, first, mass


def merge_by(x: torch.Tensor, owner: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means ``[B, keep, C]`` of ``x`` ``[B, N, C]``, and of how many tokens, ``[B, keep]``."""
    batch, tokens, width = x.shape
    order, first, mass = lined_up(owner.contiguous(), keep)
    arch = architecture(x.device)
    assert arch is not None
    cut = tile("merge.average", arch, "any")
    rows = torch.empty(batch, keep, width, dtype=x.dtype, device=x.device)
    launch(
        average, (keep, triton.cdiv(width, cut["BC"]), batch), x.device,
        x, order, first, mass, rows, *x.stride(), tokens, keep, width, **cut,
    )  # fmt: skip
    return rows, mass


def spread_rows(rows: torch.Tensor, owner: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """``[B, N, C]``: each token's owner's row of ``[B, keep, C]``, over the owner's mass."""
    batch, keep, width = rows.shape
    tokens = owner.shape[1]
    arch = architecture(rows.device)
    assert arch is not None
    cut = tile("merge.spread", arch, "any")
    x = torch.empty(batch, tokens, width, dtype=rows.dtype, device=rows.device)
    launch(
        spread, (triton.cdiv(tokens, cut["BN"]), batch), rows.device,
        rows, owner.contiguous(), mass.contiguous(), x, *rows.stride(), tokens, keep, width, **cut,
    )  # fmt: skip
    return x
