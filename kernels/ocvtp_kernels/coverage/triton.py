# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""Coverage and its refinement as Triton kernels.

    token_mean, centre (_nearest.py)                    features -> centred tokens z, float32, once
    assign (_nearest.py)                                each token's nearest kept token, and how far it is
    means, away, choose, assign, accept                 a round
    finish                                              the error

so 4 + 5 ``rounds`` launches. No atomics: sums run in the order of the tokens, whatever the batch, and which
token is nearest its cluster's mean is found by comparing integers. Nearest is found by products, distance by
differences, which lose no digits where tokens are close.

A round at (B, N, C, T) = (64, 576, 1024, 64) on an H100, counted: z (151 MB) is read four times, once each by
means and away, twice by assign (products, then differences); with means written and read, and gathered rows,
656 MB, 196 us at 3.35 TB/s, of which L2 may save a part. 9.7 GFLOP of products, three TF32 ones each, take
74 us at 395 TFLOP/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ocvtp_kernels._jit import ordered_bits
from ocvtp_kernels._launch import launch
from ocvtp_kernels._nearest import Image, assigned, centred, rows_of, squared_distance
from ocvtp_kernels._tiles import tile
from ocvtp_kernels.coverage.reference import LEAST, STEADY

# -------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N", "T"])
def means(
    z_ptr, owner_ptr, means_ptr, N, T, C,
    BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles, cluster tiles, B): mean of the tokens of each kept token, ``[B, T, C]``."""
    image = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    z_ptr += image * N * C
    total = tl.zeros([BT, BC], tl.float32)
    count = tl.zeros([BT], tl.float32)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        owner = tl.load(owner_ptr + image * N + n, mask=n < N, other=-1)
        member = (owner[None, :] == t[:, None]).to(tl.float32)
        total = tl.dot(member, rows_of(z_ptr, n, c, C, n < N), total, input_precision=PRECISION)
        count += tl.sum(member, axis=1)
    mean = total / tl.maximum(count, 1.0)[:, None]
    offsets = (image * T + t)[:, None] * C + c[None, :]
    tl.store(means_ptr + offsets, mean, mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["N", "T"])
def away(
    z_ptr, means_ptr, owner_ptr, away_ptr, N, T, C, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Grid (token tiles, B): squared distance of each token to its own cluster's mean, ``[B, N]``."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    owner = tl.load(owner_ptr + image * N + n, mask=n < N, other=0)
    distance = squared_distance(
        z_ptr + image * N * C, n, means_ptr + image * T * C, owner, n < N, C, BM, BC
    )  # fmt: skip
    tl.store(away_ptr + image * N + n, distance, mask=n < N)


@triton.jit(do_not_specialize=["N", "T"])
def choose(
    away_ptr, owner_ptr, indices_ptr, moved_ptr, N, T,
    BT: tl.constexpr, BN: tl.constexpr, STEADY: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Grid (cluster tiles, B): of each cluster the token nearest its mean, ``moved`` ``[B, T]``; others must
    be nearer than the kept token by STEADY, and ties go to the lowest. An integer orders like all of that."""
    image = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    kept = tl.load(indices_ptr + image * T + t, mask=t < T, other=-1)
    best = tl.full([BT], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        owner = tl.load(owner_ptr + image * N + n, mask=n < N, other=-1)
        distance = tl.load(away_ptr + image * N + n, mask=n < N, other=0.0)
        is_kept = n.to(tl.int64)[None, :] == kept[:, None]
        order = distance[None, :] * tl.where(is_kept, STEADY, 1.0) - tl.where(is_kept, LEAST, 0.0)
        order = ordered_bits(order).to(tl.int64) - 0x80000000
        key = (order << 32) | n.to(tl.int64)[None, :]
        key = tl.where(owner[None, :] == t[:, None], key, 0x7FFFFFFFFFFFFFFF)
        best = tl.minimum(best, tl.min(key, axis=1))
    moved = tl.where(best == 0x7FFFFFFFFFFFFFFF, kept, best & 0xFFFFFFFF)  # kept twice, it has no tokens
    tl.store(moved_ptr + image * T + t, moved, mask=t < T)


@triton.jit(do_not_specialize=["N", "T"])
def accept(
    indices_ptr, owner_ptr, distance_ptr, moved_ptr, owner_after_ptr, distance_after_ptr,
    new_indices_ptr, new_owner_ptr, new_distance_ptr, N, T, BN: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, B): an image takes the move if the sum of its distances falls, else stays."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BN)
    before = tl.zeros([BN], tl.float32)
    after = tl.zeros([BN], tl.float32)
    for start in tl.range(0, N, BN):
        inside = start + i < N
        before += tl.load(distance_ptr + image * N + start + i, mask=inside, other=0.0)
        after += tl.load(distance_after_ptr + image * N + start + i, mask=inside, other=0.0)
    fallen = tl.sum(after, axis=0) < tl.sum(before, axis=0)
    n = tl.program_id(0) * BN + i
    falls = tl.zeros([BN], tl.int32) + fallen.to(tl.int32) > 0
    token = image * N + n
    owner = tl.load(owner_ptr + token, mask=n < N, other=0)
    owner = tl.where(falls, tl.load(owner_after_ptr + token, mask=n < N, other=0), owner)
    tl.store(new_owner_ptr + token, owner, mask=n < N)
    distance = tl.load(distance_ptr + token, mask=n < N, other=0.0)
    distance = tl.where(falls, tl.load(distance_after_ptr + token, mask=n < N, other=0.0), distance)
    tl.store(new_distance_ptr + token, distance, mask=n < N)
    # No more tokens are kept than there are, so the tiles reach all of them.
    kept = image * T + n
    index = tl.load(indices_ptr + kept, mask=n < T, other=0)
    index = tl.where(falls, tl.load(moved_ptr + kept, mask=n < T, other=0), index)
    tl.store(new_indices_ptr + kept, index, mask=n < T)


@triton.jit(do_not_specialize=["N"])
def finish(distance_ptr, norms_ptr, error_ptr, N, BN: tl.constexpr):
    """Grid (B): the error, sum of distances over sum of squared norms; 0 where all tokens are equal."""
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    distance = tl.zeros([BN], tl.float32)
    norms = tl.zeros([BN], tl.float32)
    for start in tl.range(0, N, BN):
        inside = start + i < N
        distance += tl.load(distance_ptr + image * N + start + i, mask=inside, other=0.0)
        norms += tl.load(norms_ptr + image * N + start + i, mask=inside, other=0.0)
    total = tl.sum(norms, axis=0)
    # NaN must not become 0.
    error = tl.where(total == 0.0, 0.0, tl.sum(distance, axis=0) / tl.where(total == 0.0, 1.0, total))
    tl.store(error_ptr + image, error)


# ------------------------------------------------------------------------------------------------- launchers


class _Kept(NamedTuple):
    """A kept set and what it covers."""

    indices: torch.Tensor  # [B, T] int64
    owner: torch.Tensor  # [B, N] int32
    distance: torch.Tensor  # [B, N] float32


def coverage(x: torch.Tensor, indices: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept tokens ``[B, T]`` after ``rounds`` rounds, in no order, and their coverage error ``[B]``."""
    image = centred(x)
    kept = _assign(image, indices.contiguous())
    for _ in range(rounds):
        kept = _round(image, kept)
    batch, tokens, _ = x.shape
    error = torch.empty(batch, dtype=torch.float32, device=x.device)
    cut = tile("coverage.finish", image.arch, "any")
    launch(finish, (batch,), x.device, kept.distance, image.norms, error, tokens, **cut)
    # An operator's result may not be its argument.
    return kept.indices.clone() if rounds == 0 else kept.indices, error


def _assign(image: Image, indices: torch.Tensor) -> _Kept:
    owner, distance = assigned(image, indices, None, torch.int32, distances=True)
    assert distance is not None
    return _Kept(indices, owner, distance)


def _round(image: Image, kept: _Kept) -> _Kept:
    batch, tokens, width = image.z.shape
    count = kept.indices.shape[1]
    device, arch = image.z.device, image.arch
    mean = torch.empty(batch, count, width, dtype=torch.float32, device=device)
    cut = tile("coverage.means", arch, "any")
    launch(
        means, (triton.cdiv(width, cut["BC"]), triton.cdiv(count, cut["BT"]), batch), device,
        image.z, kept.owner, mean, tokens, count, width, PRECISION=image.precision, **cut,
    )  # fmt: skip
    far = torch.empty(batch, tokens, dtype=torch.float32, device=device)
    cut = tile("coverage.away", arch, "any")
    launch(
        away, (triton.cdiv(tokens, cut["BM"]), batch), device,
        image.z, mean, kept.owner, far, tokens, count, width, **cut,
    )  # fmt: skip
    moved = torch.empty(batch, count, dtype=torch.int64, device=device)
    cut = tile("coverage.choose", arch, "any")
    launch(
        choose, (triton.cdiv(count, cut["BT"]), batch), device,
        far, kept.owner, kept.indices, moved, tokens, count, STEADY=STEADY, LEAST=LEAST, **cut,
    )  # fmt: skip
    after = _assign(image, moved)
    new = _Kept(
        torch.empty(batch, count, dtype=torch.int64, device=device),
        torch.empty(batch, tokens, dtype=torch.int32, device=device),
        torch.empty(batch, tokens, dtype=torch.float32, device=device),
    )
    cut = tile("coverage.accept", arch, "any")
    launch(
        accept, (triton.cdiv(tokens, cut["BN"]), batch), device,
        *kept, *after, *new, tokens, count, **cut,
    )  # fmt: skip
    return new
