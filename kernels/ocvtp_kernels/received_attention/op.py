"""Received attention for PyTorch: operator schema, fake, gradient, FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._library import define, fold_images, handle_function, one_by_one
from ocvtp_kernels._transforms import tangent_rule, transformed
from ocvtp_kernels.received_attention import reference

__all__ = ["received_attention"]


def _launch(
    q: torch.Tensor, k: torch.Tensor, scale: float, lse: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    from ocvtp_kernels.received_attention import triton as kernels

    return kernels.received_attention(q, k, scale, lse, cu_seqlens)


def _fake(
    q: torch.Tensor, k: torch.Tensor, scale: float, lse: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    return k.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def _flops(q: Any, k: Any, scale: float, lse: Any = None, cu_seqlens: Any = None, **_: Any) -> int:
    """One q k^T. Segments count as if all were equally long, the least they can cost."""
    batch, heads, queries, head_dim = q
    segments = 1 if cu_seqlens is None else cu_seqlens[0] - 1
    return int(2 * batch * heads * queries * k[2] * head_dim // segments)


_received_attention = define(
    "received_attention(Tensor q, Tensor k, float scale, Tensor? lse, Tensor? cu_seqlens) -> Tensor",
    _launch,
    _fake,
    _flops,
)


def _launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with without_autocast(q.device):
        grads = reference.received_attention_backward(grad, q, k, scale, lse, cu_seqlens)
    return grads[0], grads[1], q.new_empty(0) if grads[2] is None else grads[2]


def _fake_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_lse = q.new_empty(0) if lse is None else lse.new_empty(lse.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), grad_lse


def _backward_flops(grad: Any, *arguments: Any, **_: Any) -> int:
    """The logits again, and a product for each of the two gradients."""
    return 3 * _flops(*arguments)


# An operator, though it is PyTorch inside: torch.compile would unroll its loop for every number of queries.
_received_attention_backward = define(
    "received_attention_backward(Tensor grad, Tensor q, Tensor k, float scale, Tensor? lse,"
    " Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
    _backward_flops,
)


class _ReceivedAttention(torch.autograd.Function):
    """The kernels forward; backward in PyTorch, a block of queries at a time (nobody trains through it)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        scale: float,
        lse: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, lse, cu_seqlens)
        ctx.scale = scale
        return _received_attention(q, k, scale, lse, cu_seqlens)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor | None, None]:
        q, k, lse, cu_seqlens = ctx.saved_tensors
        arguments = grad, q, k, ctx.scale, lse, cu_seqlens
        # To be differentiated again, by autograd or with dual numbers: through the formula.
        if torch.is_grad_enabled() or transformed(grad, q, k, lse):
            with without_autocast(q.device):
                grad_q, grad_k, grad_lse = reference.received_attention_backward(*arguments)
        else:
            grad_q, grad_k, grad_lse = _received_attention_backward(*arguments)
        return grad_q, grad_k, None, None if lse is None else grad_lse, None


def _function_flops(q: Any, k: Any, *others: Any) -> int:
    bounds = [shape for shape in others if len(shape) == 1]
    return _flops(q, k, 1.0, None, *bounds)


handle_function(_ReceivedAttention, _function_flops)


class _ReceivedAttentionTransformed(_ReceivedAttention):
    """The same for torch.func and dual numbers; derivatives by the formulas."""

    @staticmethod
    def forward(  # type: ignore[override]
        q: torch.Tensor,
        k: torch.Tensor,
        scale: float,
        lse: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        return _received_attention(q, k, scale, lse, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, ctx.scale, lse, cu_seqlens = inputs
        ctx.save_for_backward(q, k, lse, cu_seqlens)
        ctx.save_for_forward(q, k, lse, cu_seqlens)

    @staticmethod
    @tangent_rule
    def jvp(
        ctx: Any, saved: list[Any], q: torch.Tensor, k: torch.Tensor, _: None, lse: Any, __: None
    ) -> torch.Tensor:
        queries, keys, given, cu_seqlens = saved
        with without_autocast(q.device):
            return reference.received_attention_jvp(q, k, lse, queries, keys, ctx.scale, given, cu_seqlens)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        packed = arguments[-1] is not None  # which is one image
        rule = one_by_one if packed else fold_images
        return rule(received_attention, info, in_dims, *arguments)


def received_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, lse: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """See :func:`ocvtp_kernels.received_attention.received_attention`."""
    if transformed(q, k, lse, cu_seqlens):
        return _ReceivedAttentionTransformed.apply(q, k, scale, lse, cu_seqlens)
    differentiable = q.requires_grad or k.requires_grad or (lse is not None and lse.requires_grad)
    if torch.is_grad_enabled() and differentiable:
        if q is k:  # Dynamo can't pass one tensor twice to an autograd.Function
            k = k.view_as(k)
        return _ReceivedAttention.apply(q, k, scale, lse, cu_seqlens)
    return _received_attention(q, k, scale, lse, cu_seqlens)
