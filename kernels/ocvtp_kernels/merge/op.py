"""Merging for PyTorch: operator schemas, fakes, gradients, FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._library import define, fold_images, handle_function, map_images
from ocvtp_kernels._transforms import tangent_rule, transformed

__all__ = ["merge_by", "nearest_kept", "spread_rows"]


def _launch_nearest(
    compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None, count: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.merge import triton as kernels

    owner = kernels.nearest_kept(compare, indices, mask)
    if not count:
        return owner, compare.new_empty(len(indices), 0, dtype=torch.float32)
    return owner, kernels.lined_up(owner, indices.shape[1])[2]


def _fake_nearest(
    compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None, count: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, keep = indices.shape
    return (
        compare.new_empty(batch, compare.shape[1], dtype=torch.int64),
        compare.new_empty(batch, keep if count else 0, dtype=torch.float32),
    )


def _nearest_flops(compare: Any, indices: Any, *_: Any, **__: Any) -> int:
    """Products of every token and every kept one."""
    batch, tokens, width = compare
    return int(2 * batch * tokens * indices[1] * width)


def _launch_merge(x: torch.Tensor, owner: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.merge import triton as kernels

    return kernels.merge_by(x, owner, keep)


def _fake_merge(x: torch.Tensor, owner: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, width = x.shape
    return x.new_empty(batch, keep, width), x.new_empty(batch, keep, dtype=torch.float32)


def _merge_flops(x: Any, *_: Any, **__: Any) -> int:
    """A sum; for the Function, too, of which fvcore sees the tensors alone."""
    batch, tokens, width = x
    return int(batch * tokens * width)


def _launch_spread(rows: torch.Tensor, owner: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    from ocvtp_kernels.merge import triton as kernels

    return kernels.spread_rows(rows, owner, mass)


def _fake_spread(rows: torch.Tensor, owner: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], owner.shape[1], rows.shape[2])


def _spread_flops(rows: Any, owner: Any, mass: Any, **_: Any) -> int:
    """A division."""
    return int(rows[0] * owner[1] * rows[2])


_nearest_kept = define(
    "nearest_kept(Tensor compare, Tensor indices, Tensor? mask, bool count) -> (Tensor, Tensor)",
    _launch_nearest,
    _fake_nearest,
    _nearest_flops,
)
_merge_by = define(
    "merge_by(Tensor x, Tensor owner, SymInt keep) -> (Tensor, Tensor)",
    _launch_merge,
    _fake_merge,
    _merge_flops,
)
_spread_rows = define(
    "spread_rows(Tensor rows, Tensor owner, Tensor mass) -> Tensor",
    _launch_spread,
    _fake_spread,
    _spread_flops,
)

map_images(_nearest_kept)


class _MergeBy(torch.autograd.Function):
    """The means, whose gradient is spread over the tokens."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, owner: torch.Tensor, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, mass = _merge_by(x, owner, keep)
        ctx.save_for_backward(owner, mass)
        ctx.mark_non_differentiable(mass)
        return rows, mass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor, None, None]:
        return spread_rows(grad, *ctx.saved_tensors), None, None


class _SpreadRows(torch.autograd.Function):
    """The transpose of the means; its gradient are means, so both differentiate any number of times."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, owner: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(owner)
        ctx.keep = rows.shape[1]
        return _spread_rows(rows, owner, mass)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (owner,) = ctx.saved_tensors
        return merge_by(grad, owner, ctx.keep)[0], None, None


# The same for torch.func and dual numbers, which want `forward` without a context and a rule for everything.
# Not always, for `apply` costs more then, and torch.compile takes no `jvp`.


class _MergeByTransformed(_MergeBy):
    @staticmethod
    def forward(x: torch.Tensor, owner: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return _merge_by(x, owner, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, owner, ctx.keep = inputs
        _, mass = output
        ctx.save_for_backward(owner, mass)
        ctx.save_for_forward(owner)
        ctx.mark_non_differentiable(mass)

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Any], x: torch.Tensor, *_: None) -> tuple[torch.Tensor, None]:
        (owner,) = saved
        return merge_by(x, owner, ctx.keep)[0], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return fold_images(_MergeByTransformed.apply, info, in_dims, *arguments)


class _SpreadRowsTransformed(_SpreadRows):
    @staticmethod
    def forward(rows: torch.Tensor, owner: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _spread_rows(rows, owner, mass)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        rows, owner, mass = inputs
        ctx.save_for_backward(owner)
        ctx.save_for_forward(owner, mass)
        ctx.keep = rows.shape[1]

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Any], rows: torch.Tensor, *_: None) -> torch.Tensor:
        return spread_rows(rows, *saved)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return fold_images(spread_rows, info, in_dims, *arguments)


handle_function(_MergeBy, _merge_flops)
handle_function(_SpreadRows, _spread_flops)


def nearest_kept(
    compare: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None, count: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Owners ``[B, N]``, and their masses ``[B, keep]``, or ``[B, 0]`` without ``count``."""
    owner, mass = _nearest_kept(compare.detach(), indices, mask, count)
    return owner, mass


def merge_by(x: torch.Tensor, owner: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means ``[B, keep, C]``, and masses ``[B, keep]``."""
    if transformed(x, owner):
        rows, mass = _MergeByTransformed.apply(x, owner, keep)
    elif torch.is_grad_enabled() and x.requires_grad:
        # Without a gradient to come, the Function would only cost its overhead.
        rows, mass = _MergeBy.apply(x, owner, keep)
    else:
        rows, mass = _merge_by(x, owner, keep)
    return rows, mass


def spread_rows(rows: torch.Tensor, owner: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The transpose: each token's owner's row of ``[B, keep, C]`` over its mass, ``[B, N, C]``."""
    if transformed(rows, owner, mass):
        return _SpreadRowsTransformed.apply(rows, owner, mass)
    if torch.is_grad_enabled() and rows.requires_grad:
        return _SpreadRows.apply(rows, owner, mass)
    return _spread_rows(rows, owner, mass)
