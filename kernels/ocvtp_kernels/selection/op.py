"""Token selection for PyTorch: operator schemas, fakes, gradients, FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._library import define, fold_images, handle_function, map_images
from ocvtp_kernels._transforms import tangent_rule, transformed
from ocvtp_kernels.selection.shapes import ALLOW

__all__ = ["gather_tokens", "select_from_keys", "select_rows", "select_tokens"]


def _launch_select(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None, not_finite: int = ALLOW
) -> tuple[torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.selection import triton as kernels

    indices, from_slots, _ = kernels.select_tokens(slot_attention, keep, fill_scores, None, not_finite)
    return indices, from_slots


def _fake_select(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = slot_attention.shape[0]
    return (
        slot_attention.new_empty(batch, keep, dtype=torch.int64),
        slot_attention.new_empty(batch, dtype=torch.int64),
    )


def _launch_select_rows(
    slot_attention: torch.Tensor,
    keep: int,
    fill_scores: torch.Tensor | None,
    x: torch.Tensor,
    not_finite: int = ALLOW,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.selection import triton as kernels

    indices, from_slots, rows = kernels.select_tokens(slot_attention, keep, fill_scores, x, not_finite)
    assert rows is not None
    return indices, from_slots, rows


def _fake_select_rows(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None, x: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        *_fake_select(slot_attention, keep, fill_scores),
        x.new_empty(x.shape[0], keep, x.shape[2]),
    )


def _launch_select_from_keys(
    keys: torch.Tensor,
    keep: int,
    scores: torch.Tensor,
    finite: torch.Tensor | None = None,
    not_finite: int = ALLOW,
) -> tuple[torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.selection import triton as kernels

    indices, from_slots, _ = kernels.select_from_keys(keys, keep, scores, None, finite, not_finite)
    return indices, from_slots


def _launch_rows_from_keys(
    keys: torch.Tensor,
    keep: int,
    scores: torch.Tensor,
    x: torch.Tensor,
    finite: torch.Tensor | None = None,
    not_finite: int = ALLOW,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.selection import triton as kernels

    indices, from_slots, rows = kernels.select_from_keys(keys, keep, scores, x, finite, not_finite)
    assert rows is not None
    return indices, from_slots, rows


def _launch_gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    from ocvtp_kernels.selection import triton as kernels

    return kernels.gather_tokens(x, indices)


def _fake_gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], indices.shape[1], x.shape[2])


def _launch_scatter(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    from ocvtp_kernels.selection import triton as kernels

    return kernels.scatter_tokens(rows, indices, tokens)


def _fake_scatter(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], tokens, rows.shape[2])


def _no_flops(*_: Any, **__: Any) -> int:
    """Selection compares and copies; it multiplies nothing."""
    return 0


_select_tokens = define(
    "select_tokens(Tensor slot_attention, SymInt keep, Tensor? fill_scores, int not_finite=0)"
    " -> (Tensor, Tensor)",
    _launch_select,
    _fake_select,
    _no_flops,
)
_select_rows = define(
    "select_rows(Tensor slot_attention, SymInt keep, Tensor? fill_scores, Tensor x, int not_finite=0)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_select_rows,
    _fake_select_rows,
    _no_flops,
)
_select_from_keys = define(
    "select_from_keys(Tensor keys, SymInt keep, Tensor scores, Tensor? finite=None, int not_finite=0)"
    " -> (Tensor, Tensor)",
    _launch_select_from_keys,
    _fake_select,
    _no_flops,
)
_rows_from_keys = define(
    "rows_from_keys(Tensor keys, SymInt keep, Tensor scores, Tensor x, Tensor? finite=None,"
    " int not_finite=0) -> (Tensor, Tensor, Tensor)",
    _launch_rows_from_keys,
    _fake_select_rows,
    _no_flops,
)
_gather_tokens = define(
    "gather_tokens(Tensor x, Tensor indices) -> Tensor", _launch_gather, _fake_gather, _no_flops
)
_scatter_tokens = define(
    "scatter_tokens(Tensor rows, Tensor indices, SymInt tokens) -> Tensor",
    _launch_scatter,
    _fake_scatter,
    _no_flops,
)


for _operator in (_select_tokens, _select_from_keys):
    map_images(_operator)


class _GatherTokens(torch.autograd.Function):
    """The gather, whose gradient puts rows back where they came from."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.tokens = x.shape[1]
        return _gather_tokens(x, indices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (indices,) = ctx.saved_tensors
        return scatter_tokens(grad, indices, ctx.tokens), None


class _ScatterTokens(torch.autograd.Function):
    """The gather's transpose; its gradient gathers, so both differentiate any number of times."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.save_for_backward(indices)
        return _scatter_tokens(rows, indices, tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return gather_tokens(grad, indices), None, None


def _with_rows(
    from_keys: bool,
    not_finite: int,
    source: torch.Tensor,
    keep: int,
    scores: torch.Tensor | None,
    finite: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if from_keys:
        indices, from_slots, rows = _rows_from_keys(source, keep, scores, x, finite, not_finite)
    else:
        indices, from_slots, rows = _select_rows(source, keep, scores, x, not_finite)
    return indices, from_slots, rows


class _SelectRows(torch.autograd.Function):
    """Selection from a map or from keys, and gather: one launch, differentiable in the rows' source alone."""

    @staticmethod
    def forward(
        ctx: Any,
        from_keys: bool,
        not_finite: int,
        source: torch.Tensor,
        keep: int,
        scores: torch.Tensor | None,
        finite: torch.Tensor | None,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        indices, from_slots, rows = _with_rows(from_keys, not_finite, source, keep, scores, finite, x)
        ctx.save_for_backward(indices)
        ctx.tokens = x.shape[1]
        ctx.mark_non_differentiable(indices, from_slots)
        return indices, from_slots, rows

    @staticmethod
    def backward(
        ctx: Any, _: None, __: None, grad: torch.Tensor
    ) -> tuple[None, None, None, None, None, None, torch.Tensor]:
        (indices,) = ctx.saved_tensors
        return None, None, None, None, None, None, scatter_tokens(grad, indices, ctx.tokens)


# The same for torch.func and dual numbers, which want `forward` without a context and a rule for everything.
# Not always, for `apply` costs more then, and torch.compile takes no `jvp`.


class _GatherTokensTransformed(_GatherTokens):
    @staticmethod
    def forward(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _gather_tokens(x, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, indices = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.tokens = x.shape[1]

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Any], x: torch.Tensor, _: None) -> torch.Tensor:
        return gather_tokens(x, *saved)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return fold_images(gather_tokens, info, in_dims, *arguments)


class _ScatterTokensTransformed(_ScatterTokens):
    @staticmethod
    def forward(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:  # type: ignore[override]
        return _scatter_tokens(rows, indices, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, indices, ctx.tokens = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Any], rows: torch.Tensor, *_: None) -> torch.Tensor:
        (indices,) = saved
        return scatter_tokens(rows, indices, ctx.tokens)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return fold_images(scatter_tokens, info, in_dims, *arguments)


class _SelectRowsTransformed(_SelectRows):
    @staticmethod
    def forward(  # type: ignore[override]
        from_keys: bool,
        not_finite: int,
        source: torch.Tensor,
        keep: int,
        scores: torch.Tensor | None,
        finite: torch.Tensor | None,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _with_rows(from_keys, not_finite, source, keep, scores, finite, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        indices, from_slots, _ = output
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.tokens = inputs[-1].shape[1]
        ctx.mark_non_differentiable(indices, from_slots)

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[None, None, torch.Tensor]:
        return None, None, gather_tokens(tangents[-1], *saved)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return fold_images(_SelectRowsTransformed.apply, info, in_dims, *arguments)


for _function in (_GatherTokens, _ScatterTokens, _SelectRows):
    handle_function(_function, _no_flops)


def select_tokens(
    slot_attention: torch.Tensor, keep: int, fill_scores: torch.Tensor | None, not_finite: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_tokens`."""
    return _select_tokens(slot_attention.detach(), keep, _detached(fill_scores), not_finite)


def select_rows(
    slot_attention: torch.Tensor,
    keep: int,
    fill_scores: torch.Tensor | None,
    x: torch.Tensor,
    not_finite: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`ocvtp_kernels.selection.select_rows`."""
    return _rows(False, not_finite, slot_attention.detach(), keep, _detached(fill_scores), None, x)


def select_from_keys(
    keys: torch.Tensor,
    keep: int,
    scores: torch.Tensor,
    x: torch.Tensor | None,
    finite: torch.Tensor | None,
    not_finite: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See :func:`ocvtp_kernels.selection.select_from_keys`."""
    if x is None:
        return (*_select_from_keys(keys, keep, scores.detach(), finite, not_finite), None)
    return _rows(True, not_finite, keys, keep, scores.detach(), finite, x)


def _rows(
    from_keys: bool,
    not_finite: int,
    source: torch.Tensor,
    keep: int,
    scores: torch.Tensor | None,
    finite: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = from_keys, not_finite, source, keep, scores, finite, x
    if transformed(source, scores, finite, x):
        return _SelectRowsTransformed.apply(*arguments)
    # Without a gradient to come, the Function would only cost its overhead.
    if torch.is_grad_enabled() and x.requires_grad:
        return _SelectRows.apply(*arguments)
    return _with_rows(*arguments)


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`ocvtp_kernels.selection.gather_tokens`."""
    if transformed(x, indices):
        return _GatherTokensTransformed.apply(x, indices)
    if torch.is_grad_enabled() and x.requires_grad:
        return _GatherTokens.apply(x, indices)
    return _gather_tokens(x, indices)


def scatter_tokens(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """The transpose: ``[B, keep, C]`` to where they came from, ``[B, tokens, C]``, added up."""
    if transformed(rows, indices):
        return _ScatterTokensTransformed.apply(rows, indices, tokens)
    if torch.is_grad_enabled() and rows.requires_grad:
        return _ScatterTokens.apply(rows, indices, tokens)
    return _scatter_tokens(rows, indices, tokens)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()
