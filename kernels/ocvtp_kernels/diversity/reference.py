"""Diverse tokens, greedily, in plain PyTorch: the oracle."""

from __future__ import annotations

import torch

#: A squared volume below this share of a token's own is rounding.
EPS = 1e-5


def in_range(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, N, C]`` in at least float32, one layout and one range, whose squares don't overflow.

    The order of a sum decides ties, say in pairs. An image's largest value is brought near 1 by a power of
    two: no digit changes.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    _, exponent = torch.frexp(x.abs().amax(dim=(1, 2), keepdim=True))
    return torch.ldexp(x, -exponent.clamp(-120, 120))  # by a factor that is an ordinary float32


def farthest_points(x: torch.Tensor, keep: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, keep]`` in the order of choice, of tokens in range; first those of ``start`` that are not -1."""
    x = x - x.mean(dim=1, keepdim=True)  # products then lose fewer digits than their difference can spare
    square = x.square().sum(dim=2)
    token = _given(start, 0, square.argmin(dim=1))
    nearest = torch.full_like(square, float("inf"))
    order = [token]
    for i in range(1, keep):
        at = token[:, None]
        product = (x @ _row(x, token).mT)[:, :, 0]
        distance = (square + square.gather(1, at) - 2.0 * product).clamp_min(0.0)
        # Below any distance, so that even copies of what is kept come before it.
        nearest = torch.minimum(nearest, distance).scatter(1, at, -1.0)
        token = _given(start, i, nearest.argmax(dim=1))
        order.append(token)
    return torch.stack(order, dim=1)


def _given(start: torch.Tensor | None, step: int, token: torch.Tensor) -> torch.Tensor:
    """What the caller chose for a step, or else ``token``."""
    if start is None:
        return token
    return torch.where(start[:, step] >= 0, start[:, step], token)


def largest_volume(x: torch.Tensor, keep: int) -> torch.Tensor:
    """``[B, keep]`` in the order of choice, of tokens in range."""
    x = torch.nn.functional.normalize(x, dim=2)
    batch, tokens, _ = x.shape
    factor = x.new_zeros(batch, keep, tokens)  # row i: all tokens along the i-th kept one's own direction
    left = x.new_ones(batch, tokens)  # squared volume that a token would add; below 0: kept already
    token = left.argmax(dim=1)
    order = [token]
    for i in range(keep - 1):
        at = token[:, None]
        similarity = (x @ _row(x, token).mT)[:, :, 0]
        known = factor.gather(2, at[:, None].expand(-1, keep, -1))  # [B, keep, 1]
        direction = similarity - (factor * known).sum(dim=1)
        direction = direction / left.gather(1, at).clamp_min(EPS).sqrt()
        factor[:, i] = direction
        rest = left - direction.square()
        rest = torch.where(rest < EPS, 0.0, rest)
        left = torch.where(left < 0, left, rest).scatter(1, at, -1.0)
        token = left.argmax(dim=1)
        order.append(token)
    return torch.stack(order, dim=1)


def _row(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``[B, 1, C]``: the token of each image."""
    return x.gather(1, token[:, None, None].expand(-1, 1, x.shape[2]))
