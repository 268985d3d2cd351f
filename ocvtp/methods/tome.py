"""ToMe: pairs of like tokens become one, step by step, with a size that says how many each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ocvtp.methods._inputs import (
    best,
    check_features,
    check_tensor,
    cosines,
    owners,
    rows_of,
    wide,
    wide_rows,
)
from ocvtp.selection import Reduction
from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._checks import as_int, require_count, require_floating, require_int64, require_shape
from ocvtp_kernels._device import without_autocast

# ---------------------------------------------------------------------------------------------- schedules


def schedule(blocks: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """How many tokens each block merges away.

    Args:
        blocks: of the tower.
        r: an int: as many in every block. ``(r, inflect)``, the second a float: linear from
            ``r * (1 - inflect)`` to ``r * (1 + inflect)``, each truncated, so -1.0 falls from 2r to 0. A
            list: the first blocks', and 0 of all others.

    Raises:
        TypeError, ValueError: what is none of these, or more numbers than blocks.
    """
    count = as_int(r)
    if count is not None:
        numbers = [count] * blocks
    elif isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        low = int(r[0] * (1.0 - r[1]))
        rise = (2 * r[0] - 2 * low) / max(blocks - 1, 1)
        numbers = [int(low + rise * block) for block in range(blocks)]
    else:
        if not isinstance(r, Sequence) or isinstance(r, str) or any(as_int(number) is None for number in r):
            raise TypeError(f"r must be an int, (int, float) or ints; got {r!r}")
        if len(r) > blocks:
            raise ValueError(f"r has {len(r)} numbers for {blocks} blocks")
        numbers = [*(int(number) for number in r), *[0] * (blocks - len(r))]
    if any(number < 0 for number in numbers):
        raise ValueError(f"r must not be negative; got {numbers}")
    return numbers


def even_schedule(tokens: int, keep: int, blocks: int) -> list[int]:
    """As even numbers as lead from ``tokens`` to ``keep`` in so many blocks, the larger ones first.

    Ours, since nothing is published for language models: LLaVA-1.5 reads 23 blocks and merges 576 tokens to
    192 by 16 blocks of 17 and 7 of 16, to 128 by 11 of 20 and 12 of 19, to 64 by 6 of 23 and 17 of 22. A
    block merges at most half: where later ones can't merge their share, earlier ones merge more.

    Args:
        tokens: patches in the beginning.
        keep: patches in the end, ``1 <= keep <= tokens``.
        blocks: that merge, at least 1.

    Raises:
        TypeError, ValueError: a wrong number, or fewer tokens than so many blocks can reach.
    """
    keep = require_count("keep", keep, tokens, "tokens")
    if as_int(blocks) is None or blocks < 1:
        raise ValueError(f"blocks must be an int of at least 1; got {blocks!r}")

    def merging(most: int) -> list[int]:
        """What every block merges, if none merges more than ``most`` or than it can."""
        found, left = [], tokens
        for _ in range(blocks):
            found.append(min(most, left // 2))
            left -= found[-1]
        return found

    least = tokens - sum(merging(tokens))
    if keep < least:
        raise ValueError(
            f"{blocks} blocks merge {tokens} tokens to {least} at least, since each merges at most half of "
            f"them; {keep} were wanted"
        )
    most = next(number for number in range(tokens + 1) if tokens - sum(merging(number)) <= keep)
    numbers = merging(most)
    surplus = sum(numbers) - (tokens - keep)  # fewer than there are largest ones, or `most` was not the least
    largest = [block for block, number in enumerate(numbers) if number == most]
    for block in largest[len(largest) - surplus :]:
        numbers[block] -= 1
    return numbers


# ----------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Match:
    """Which tokens merge into which in one step. Positions are those before it, but for ``owner``.

    Attributes:
        sources: ``[B, r]`` int64, tokens that merge, most similar first; at even positions.
        destinations: ``[B, r]`` int64, the token that each goes into; at odd positions.
        unmerged: ``[B, u]`` int64, tokens at even positions that stay: ascending if there is a class token,
            which thus stays first, else most similar first.
        order: ``[B, t - r]`` int64, tokens that are left, in the order they have afterwards.
        owner: ``[B, t]`` int64, position afterwards of the token that each is or went into.
    """

    sources: torch.Tensor
    destinations: torch.Tensor
    unmerged: torch.Tensor
    order: torch.Tensor
    owner: torch.Tensor


@torch.no_grad()
def match(metric: torch.Tensor, r: int, *, class_token: bool = False, distill_token: bool = False) -> Match:
    """The ``r`` tokens at even positions that are most like one at an odd position, and which that is.

    ToMe, arXiv 2210.09461, section 3. Afterwards come those at even positions that stay, then those at odd
    ones; the next step splits that order. Of equals the lowest position wins everywhere. Without anything to
    merge the order stays.

    Args:
        metric: ``[B, t, d]`` finite floating point: what similarity is measured on, mean over heads of the
            block's keys. Cosines in at least float32.
        r: tokens to merge, at least 0; at most ``(t - protected) // 2`` are, of ``protected`` tokens below.
        class_token: the first token never merges.
        distill_token: the second token is nobody's destination; it then comes second.

    Raises:
        TypeError, ValueError: a wrong type or shape, a negative ``r``, or NaN or Inf.
    """
    require_floating("metric", metric)
    require_shape("metric", metric, (None, None, None), "[B, t, d]")
    check_tensor("metric", metric, (None, None, None), "[B, t, d]", metric)
    wanted = as_int(r)
    if wanted is None or wanted < 0:
        raise ValueError(f"r must be an int of at least 0; got {r!r}")
    batch, tokens, _ = metric.shape
    count = min(wanted, max(tokens - int(class_token) - int(distill_token), 0) // 2)
    places = torch.arange(tokens, device=metric.device).expand(batch, -1)
    if count == 0:
        return Match(places[:, :0], places[:, :0], places[:, ::2], places, places)
    similar = cosines(metric[:, ::2], metric[:, 1::2])
    if class_token:
        similar[:, 0] = float("-inf")
    if distill_token:
        similar[:, :, 0] = float("-inf")
    nearest = similar.argmax(dim=2)
    ranked = best(similar.gather(2, nearest[:, :, None])[:, :, 0], similar.shape[1])
    sources, unmerged = ranked[:, :count], ranked[:, count:]
    if class_token:
        unmerged = unmerged.sort(dim=1).values
    destinations = 2 * nearest.gather(1, sources) + 1
    sources, unmerged = 2 * sources, 2 * unmerged
    odd = places[:, 1::2]
    order = torch.cat([unmerged, odd], dim=1)
    if distill_token:
        order = torch.cat([unmerged[:, :1], odd[:, :1], unmerged[:, 1:], odd[:, 1:]], dim=1)
    return _ordered(Match(sources, destinations, unmerged, places, places), order)


def _ordered(pairs: Match, order: torch.Tensor) -> Match:
    """The same pairs with tokens left in ``order``."""
    owner = owners(order, pairs.owner.shape[1])
    return replace(
        pairs, order=order, owner=owner.scatter(1, pairs.sources, owner.gather(1, pairs.destinations))
    )


def merge(x: torch.Tensor, size: torch.Tensor, match: Match) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after one step, each the mean of what it is made of, weighted by size.

    Args:
        x: ``[B, t, C]`` floating point.
        size: ``[B, t, 1]`` floating point, how many original tokens each stands for: ones in the beginning.
        match: of the same tokens.

    Returns:
        ``[B, t - r, C]`` in the dtype of ``x``, computed in at least float32 and differentiable in ``x``, and
        ``[B, t - r, 1]`` in at least float32, where sizes are exact; they have no gradient.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    batch, tokens = match.owner.shape
    for name, tensor, meaning in (("x", x, "[B, t, C]"), ("size", size, "[B, t, 1]")):
        require_floating(name, tensor)
        require_shape(name, tensor, (batch, tokens, 1 if name == "size" else None), f"{meaning} of match")
    size = wide(size)
    if match.sources.shape[1] == 0:
        return x, size
    # Sums of one product instead of scattered additions, whose order a GPU doesn't keep.
    into = match.owner.gather(1, match.sources)
    went = torch.arange(match.order.shape[1], device=into.device)[:, None] == into[:, None]
    sums = wide_rows(x) * size.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x.device):
        merged, sizes = (
            rows_of(rows, match.order)
            + image_by_image(_product, went.to(rows.dtype), rows_of(rows, match.sources))[0]
            for rows in (sums, size)
        )
    return (merged / sizes).to(x.dtype), sizes


def _product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor]:
    return (left @ right,)


def carry(owner: torch.Tensor, match: Match) -> torch.Tensor:
    """``owner`` after one more step.

    Args:
        owner: ``[B, N]`` int64, position of the token that each original one has gone into so far; at first
            0 to N - 1.
        match: the step.

    Returns:
        ``[B, N]`` int64.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    require_int64("owner", owner)
    require_shape("owner", owner, (match.owner.shape[0], None), "[B, N] of match")
    return match.owner.gather(1, owner)


def raster(owner: torch.Tensor, tokens: int, *, prefix: int = 1) -> torch.Tensor:
    """``[B, tokens - prefix]`` int64: tokens in the order of the first original one in each.

    Ours: ToMe leaves tokens in the order of its steps, a language model reads them by rows.

    Args:
        owner: ``[B, N]`` int64, position of the token that each original one went into.
        tokens: how many there are now.
        prefix: original tokens that are no patches, the class token; theirs are left out.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    require_int64("owner", owner)
    require_shape("owner", owner, (None, None), "[B, N]")
    return first_places(owner, tokens).argsort(dim=1, stable=True)[:, prefix:]


def first_places(owner: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[B, tokens]`` int64: the first original token that went into each; as many as there are, of none."""
    total = owner.shape[1]
    places = torch.arange(total, device=owner.device).expand_as(owner)
    none = torch.full((len(owner), tokens), total, dtype=torch.int64, device=owner.device)
    return none.scatter_reduce(1, owner, places, "amin")


# ------------------------------------------------------------------------------------- after the encoder


def tome_post(features: torch.Tensor, keep: int) -> Reduction:
    """ToMe's matching on tokens that no encoder follows: step by step until ``keep`` are left.

    An adaptation ("ToMe-post"), for encoders whose windows and mergers forbid fewer tokens inside. Every step
    matches the merged features themselves and merges at most half of them. Means are weighted by size, and
    tokens stay in raster order, each at its destination's place; the next step splits that.

    Args:
        features: ``[B, N, D]`` finite floating point: the merger's rows.
        keep: rows to make, ``1 <= keep <= N``.

    Returns:
        :class:`~ocvtp.selection.Reduction` with rows ``[B, keep, D]`` in the features' dtype, ascending by
        place. Rows are differentiable in ``features``; who merges with whom has no gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    keep = check_features(features, keep)
    check_tensor("features", features, (None, None, None), "[B, N, D]", features)
    batch, tokens, _ = features.shape
    rows = wide_rows(features)
    size = rows.new_ones(batch, tokens, 1)
    slots = torch.arange(tokens, device=features.device).repeat(batch, 1)
    owner = slots
    while rows.shape[1] > keep:
        pairs = match(rows, rows.shape[1] - keep)
        pairs = _ordered(pairs, pairs.order.sort(dim=1).values)
        rows, size = merge(rows, size, pairs)
        owner, slots = carry(owner, pairs), slots.gather(1, pairs.order)
    return Reduction(rows.to(features.dtype), slots, owner, tokens)
