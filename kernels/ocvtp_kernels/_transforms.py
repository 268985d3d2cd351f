"""What is asked of an operation besides its values: transforms of ``torch.func``, and dual numbers.

An operator of ours is a black box to PyTorch, which then drops tangents and gradients of a transform without
a word. So every public function looks here first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` runs, or a level of dual numbers is open."""
    return _in_a_transform() or forward_ad._current_level >= 0  # read here: so Dynamo guards on it


@torch.compiler.assume_constant_result  # Dynamo enters what it traces, and guards on what is around it
def _in_a_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


def transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether a transform holds one of ``tensors``, or one is a dual number.

    Compiled code can't look at single tensors: there it is whether a transform runs at all.
    """
    if not transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    return any(tensor is not None and (_is_wrapped(tensor) or _is_dual(tensor)) for tensor in tensors)


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative is asked for in one of ``tensors``, at any level; ``vmap`` alone asks for none."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # no generator: torch 2.7 can't trace one
            if tensor is not None and tensor.requires_grad:
                return True
    if not transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    return any(tensor is not None and _has_derivative(tensor) for tensor in tensors)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """What the wrappers of transforms hold: with a dimension more for each ``vmap``, in some place."""
    while transforms_active() and _is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` may be looked at by nobody, since it, or what runs, stands for more than its values:
    fake tensors, ``make_fx``, ``torch.export``.
    """
    keys = torch._C._TorchDispatchModeKey
    return isinstance(tensor, torch._subclasses.FakeTensor) or any(
        torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    )


def tangent_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """A ``jvp`` for an autograd function, of ``function(ctx, saved, *tangents)``.

    PyTorch switches forward mode off around it, and with it the tangents of a ``jvp`` further out. Here they
    go on; the saved tensors come without the tangents that this very rule is about.
    """

    @functools.wraps(function)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            return function(ctx, saved, *tangents)

    return jvp


def _has_derivative(tensor: torch.Tensor) -> bool:
    if forward_ad._current_level >= 0:  # forward mode heeds no torch.no_grad; and tangents may lie deeper
        return _is_wrapped(tensor) or _is_dual(tensor)
    while torch.is_grad_enabled() and _is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def _is_wrapped(tensor: torch.Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_dual(tensor: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
