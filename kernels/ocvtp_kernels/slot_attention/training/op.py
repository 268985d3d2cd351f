"""The trainable step of Slot Attention for PyTorch: operator schemas, fakes, gradient, FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._library import define, handle_function

__all__ = ["slot_update"]


def _launch(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, eps: float, return_attention: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.slot_attention.training import triton as kernels

    return kernels.slot_update(queries, keys, values, eps, return_attention)


def _fake(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, eps: float, return_attention: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, slots, width = queries.shape
    shape = (batch, slots, keys.shape[1]) if return_attention else (0,)
    return (
        queries.new_empty(batch, slots, width, dtype=torch.float32),
        queries.new_empty(batch, slots, dtype=torch.float32),
        queries.new_empty(shape, dtype=torch.float32),
    )


def _flops(queries: Any, keys: Any, *_: Any, **__: Any) -> int:
    """Logits and weighted means; that chunks of slots compute logits twice is not counted."""
    batch, slots, width = queries
    return int(2 * 2 * batch * slots * keys[1] * width)


_slot_update = define(
    "slot_update(Tensor queries, Tensor keys, Tensor values, float eps, bool return_attention)"
    " -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    _flops,
)


def _launch_backward(
    grad: torch.Tensor,
    grad_map: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor,
    mass: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.slot_attention.training import triton as kernels

    with without_autocast(queries.device):
        return kernels.slot_update_backward(grad, grad_map, queries, keys, values, mean, mass, eps)


def _fake_backward(
    grad: torch.Tensor,
    grad_map: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor,
    mass: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _backward_flops(grad: Any, grad_map: Any, queries: Any, keys: Any, *_: Any, **__: Any) -> int:
    """Logits again, the map's gradient, and a product for each of the three gradients."""
    return 5 * _flops(queries, keys) // 2


_slot_update_backward = define(
    "slot_update_backward(Tensor grad, Tensor? grad_map, Tensor queries, Tensor keys, Tensor values,"
    " Tensor mean, Tensor mass, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
    _backward_flops,
)


class _SlotUpdate(torch.autograd.Function):
    """Saves its operands, the means and two numbers a slot; backward computes the attention again."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        eps: float,
        return_attention: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, mass, attention = _slot_update(queries, keys, values, eps, return_attention)
        ctx.save_for_backward(queries, keys, values, mean, mass)
        ctx.eps = eps
        ctx.return_attention = return_attention
        if not torch.compiler.is_compiling():  # compiled code has a gradient for every result
            ctx.set_materialize_grads(False)
        return mean, attention

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_map: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "slot_attention's Triton kernels have no second derivative; "
                'use backend="torch" to differentiate a gradient'
            )
        queries, keys, values, mean, mass = ctx.saved_tensors
        if not ctx.return_attention:
            grad_map = None
        if grad is None and grad_map is None:
            return None, None, None, None, None
        if grad is None:
            grad = torch.zeros_like(mean)
        gradients = _slot_update_backward(grad, grad_map, queries, keys, values, mean, mass, ctx.eps)
        return *gradients, None, None


def _function_flops(queries: Any, keys: Any, *_: Any) -> int:
    return _flops(queries, keys)


handle_function(_SlotUpdate, _function_flops)


def slot_update(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, eps: float, return_attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the slots take from the tokens: softmax over slots of ``queries keys^T``, and weighted means.

    Args:
        queries: ``[B, K, D]``, scaled.
        keys: ``[B, N, D]``, in the dtype of the queries: float32, float16 or bfloat16.
        values: ``[B, N, D]``, likewise.
        eps: added to a slot's total attention before dividing by it.
        return_attention: also return the map.

    Returns:
        means ``[B, K, D]`` and attention ``[B, K, N]``, or an empty tensor; float32.
    """
    differentiable = queries.requires_grad or keys.requires_grad or values.requires_grad
    if torch.is_grad_enabled() and differentiable:
        return _SlotUpdate.apply(queries, keys, values, eps, return_attention)
    mean, _, attention = _slot_update(queries, keys, values, eps, return_attention)
    return mean, attention
