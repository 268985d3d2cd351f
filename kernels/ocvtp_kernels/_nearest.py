# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Each token's nearest kept token as Triton kernels: what coverage and merging share.

    token_mean, centre      features, any strides -> centred tokens z, float32, and their squared norms
    assign                  whose each token is, by products; how far it is, if wanted, by differences

Bytes at (B, N, C, T) = (64, 576, 1024, 64) from float16: token_mean reads 75 MB, centre reads them again and
writes z, 151 MB; assign reads z, 151 MB, once more for distances, and 17 MB of kept rows, from L2 for every
tile of tokens but one. Without distances that is 470 MB, 140 us at 3.35 TB/s. 4.8 GFLOP of products, three
TF32 ones each, take 37 us at 395 TFLOP/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ocvtp_kernels._arch import architecture
from ocvtp_kernels._launch import launch
from ocvtp_kernels._tiles import tile

#: The largest float32: as far as a kept token can be.
MOST = tl.constexpr(3.4028234663852886e38)

# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def rows_of(ptr, row, column, C, real):
    """``[rows, columns]`` of a contiguous matrix of C columns; zeros outside and where a row is not real."""
    inside = real[:, None] & (column < C)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * C + column[None, :], mask=inside, other=0.0)


@triton.jit
def squared_distance(a_ptr, a_row, b_ptr, b_row, real, C, BM: tl.constexpr, BC: tl.constexpr):
    """Between row ``a_row`` of one matrix and row ``b_row`` of another, pair by pair, ``[BM]``."""
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(0, C, BC):
        c = start + tl.arange(0, BC)
        difference = rows_of(a_ptr, a_row, c, C, real) - rows_of(b_ptr, b_row, c, C, real)
        total += tl.sum(difference * difference, axis=1)
    return total


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N"])
def token_mean(x_ptr, mean_ptr, x_b, x_n, x_c, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """Grid (column tiles, B): mean over tokens of ``[B, N, C]``, any strides -> ``[B, C]`` float32."""
    image = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        offsets = n.to(tl.int64)[:, None] * x_n + c.to(tl.int64)[None, :] * x_c
        inside = (n < N)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + image * x_b + offsets, mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
    tl.store(mean_ptr + image * C + c, total / N, mask=c < C)


@triton.jit(do_not_specialize=["N"])
def centre(
    x_ptr, mean_ptr, z_ptr, norms_ptr, x_b, x_n, x_c, N, C, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Grid (token tiles, B): ``z = x - mean`` ``[B, N, C]`` float32, and its squared norms ``[B, N]``."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    norms = tl.zeros([BN], tl.float32)
    for start in tl.range(0, C, BC):
        c = start + tl.arange(0, BC)
        offsets = n.to(tl.int64)[:, None] * x_n + c.to(tl.int64)[None, :] * x_c
        inside = (n < N)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + image * x_b + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + image * C + c, mask=c < C, other=0.0)
        z = tl.where(inside, x - mean[None, :], 0.0)
        tl.store(z_ptr + (image * N + n)[:, None] * C + c[None, :], z, mask=inside)
        norms += tl.sum(z * z, axis=1)
    tl.store(norms_ptr + image * N + n, norms, mask=n < N)


@triton.jit(do_not_specialize=["N", "T"])
def assign(
    z_ptr, norms_ptr, indices_ptr, mask_ptr, owner_ptr, distance_ptr, N, T, C,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    MASKED: tl.constexpr, DISTANCES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): each token's nearest kept token, ``owner`` ``[B, N]`` among the T, and if wanted
    the squared ``distance`` ``[B, N]`` to it. A kept token is its own; ties go to the first. What is no
    number counts as the largest there is, and what ``mask`` ``[B, T]`` takes out as larger still. An index
    that is no token owns nothing, and makes all distances of its image NaN."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    z_ptr += image * N * C
    indices_ptr += image * T
    best = tl.full([BM], float("inf"), tl.float32)
    owner = tl.zeros([BM], tl.int32)
    strange = tl.zeros([BK], tl.int32)
    for first in tl.range(0, T, BK):
        t = first + tl.arange(0, BK)
        index = tl.load(indices_ptr + t, mask=t < T, other=-1)
        real = (index >= 0) & (index < N)
        kept = tl.where(real, index, -1).to(tl.int32)
        if DISTANCES:
            strange += (t < T).to(tl.int32) - real.to(tl.int32)
        owns = real
        if MASKED:
            owns &= tl.load(mask_ptr + image * T + t, mask=t < T, other=0) != 0
        product = tl.zeros([BM, BK], tl.float32)
        for start in tl.range(0, C, BC):
            c = start + tl.arange(0, BC)
            z = rows_of(z_ptr, n, c, C, n < N)
            k = rows_of(z_ptr, kept, c, C, real)
            product = tl.dot(z, tl.trans(k), product, input_precision=PRECISION)
        # A token's own norm is the same for every kept token, and left out.
        norms = tl.load(norms_ptr + image * N + kept, mask=real, other=0.0)
        score = norms[None, :] - 2.0 * product
        score = tl.where(score < MOST, score, MOST)  # NaN, too
        score = tl.where(n[:, None] == kept[None, :], float("-inf"), score)
        score = tl.where(owns[None, :], score, float("inf"))
        lowest, which = tl.min(score, axis=1, return_indices=True)
        owner = tl.where(lowest < best, first + which, owner)
        best = tl.minimum(best, lowest)
    tl.store(owner_ptr + image * N + n, owner, mask=n < N)
    if DISTANCES:
        known = tl.zeros([BM], tl.int32) + tl.sum(strange, axis=0) == 0
        kept = tl.load(indices_ptr + owner, mask=(n < N) & known, other=0)
        distance = squared_distance(z_ptr, n, z_ptr, kept, (n < N) & known, C, BM, BC)
        distance = tl.where(known, distance, float("nan"))
        tl.store(distance_ptr + image * N + n, distance, mask=n < N)


# ------------------------------------------------------------------------------------------------- launchers


class Image(NamedTuple):
    """Centred tokens, their squared norms, and where they are computed with."""

    z: torch.Tensor  # [B, N, C] float32
    norms: torch.Tensor  # [B, N] float32
    arch: str
    precision: str


def centred(x: torch.Tensor) -> Image:
    """Of ``x`` ``[B, N, C]``."""
    batch, tokens, width = x.shape
    arch = architecture(x.device)
    assert arch is not None
    mean = torch.empty(batch, width, dtype=torch.float32, device=x.device)
    cut = tile("nearest.token_mean", arch, "any")
    launch(
        token_mean, (triton.cdiv(width, cut["BC"]), batch), x.device,
        x, mean, *x.stride(), tokens, width, **cut,
    )  # fmt: skip
    z = torch.empty(batch, tokens, width, dtype=torch.float32, device=x.device)
    norms = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    cut = tile("nearest.centre", arch, "any")
    launch(
        centre, (triton.cdiv(tokens, cut["BN"]), batch), x.device,
        x, mean, z, norms, *x.stride(), tokens, width, **cut,
    )  # fmt: skip
    return Image(z, norms, arch, "ieee" if arch.startswith("gfx") else "tf32x3")


def assigned(
    image: Image, indices: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype, *, distances: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Owners ``[B, N]`` in ``dtype``, and squared distances to them, ``[B, N]`` float32, if wanted.

    ``indices`` ``[B, T]`` and ``mask``, bool, must be contiguous.
    """
    batch, tokens, width = image.z.shape
    kept = indices.shape[1]
    owner = torch.empty(batch, tokens, dtype=dtype, device=indices.device)
    distance = torch.empty(batch, tokens, dtype=torch.float32, device=indices.device) if distances else None
    cut = tile("nearest.assign", image.arch, "T<=64" if kept <= 64 else "any T")
    launch(
        assign, (triton.cdiv(tokens, cut["BM"]), batch), indices.device,
        image.z, image.norms, indices, indices if mask is None else mask.view(torch.uint8),
        owner, image.norms if distance is None else distance, tokens, kept, width,
        MASKED=mask is not None, DISTANCES=distances, PRECISION=image.precision, **cut,
    )  # fmt: skip
    return owner, distance
