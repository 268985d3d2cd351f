"""Weights that are elsewhere until a module is called: sharded by FSDP2, or kept by accelerate.

Both bring a module's weights just before its ``forward`` and take them away after it. The vision side goes
around the calls of some modules and calls parts of them instead, so it has to do that :func:`inside` of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Name under which a module is asked to run something of ours, while it runs.
_RUN = "_ocvtp_inside"


def inside(
    modules: Sequence[Any], run: Callable[..., Any], *tensors: torch.Tensor, calling: Sequence[Any] = ()
) -> Any:
    """``run(*tensors)`` as a part of the calls of ``modules``, in which their weights are at hand.

    Only what looks after weights sees such a call: other people's forward hooks don't fire. Where weights
    stay in place, it is ``run(*tensors)`` and nothing else.

    Args:
        modules: outermost first, each at most once.
        run: takes the tensors, which may be moved or cast on the way, and returns a tensor or a tuple of
            tensors. Gradients reach sharded weights through these alone.
        tensors: what goes in.
        calling: modules whose calls are under way already.
    """
    if not modules:
        return run(*tensors)
    module, rest = modules[0], modules[1:]
    if hasattr(module, "unshard"):
        if not any(module is one for one in calling):
            return _unsharded(module, functools.partial(inside, rest, run, calling=calling), *tensors)
    else:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and _is_waiting(module, hook):
            return _loaded(module, hook, functools.partial(inside, rest, run, calling=calling), *tensors)
    return inside(rest, run, *tensors, calling=calling)


def is_minded(module: torch.nn.Module) -> bool:
    """Whether somebody brings the weights of a module to where it computes, so that we need not, nor may."""
    return any(hasattr(part, "unshard") or hasattr(part, "_hf_hook") for part in module.modules())


def is_plain(module: torch.nn.Module) -> bool:
    """Whether all parts of a module are PyTorch's, transformers' or ours: weights and a ``forward``.

    Others may keep what they make of their weights, or compute otherwise from call to call.
    """
    return all(
        type(part).__module__.partition(".")[0] in ("torch", "transformers", "ocvtp") and _own_forward(part)
        for part in module.modules()
    )


def _own_forward(module: torch.nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward``; accelerate may leave it on the instance."""
    own = module.__dict__.get("forward")
    if own is None:
        return True
    return getattr(own, "__func__", None) is type(module).forward and own.__self__ is module


def _unsharded(module: Any, run: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """FSDP2's own way to another method than ``forward``: gather, run, shard again, and so in backward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    module.__dict__[_RUN] = functools.partial(_owned, run)
    try:
        register_fsdp_forward_method(module, _RUN)
        return getattr(module, _RUN)(*tensors)
    finally:
        module.__dict__.pop(_RUN, None)


def _owned(run: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """What ``run`` returns, in memory of its own: FSDP2 warns of views, whose changes its hooks can't see."""
    made = run(*tensors)
    if isinstance(made, torch.Tensor):
        return made if made._base is None else made.clone()
    return tuple(one if one._base is None else one.clone() for one in made)


def _loaded(module: Any, hook: Any, run: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """What accelerate puts in the place of ``forward``, with something else in it."""
    tensors, _ = hook.pre_forward(module, *tensors)
    with torch.no_grad() if hook.no_grad else contextlib.nullcontext():
        made = run(*tensors)
    return hook.post_forward(module, made)


def _is_waiting(module: Any, hook: Any) -> bool:
    """Whether accelerate has yet to do something to the weights of a module before it can compute."""
    for one in getattr(hook, "hooks", (hook,)):
        if not type(one).__module__.startswith("accelerate.") or not getattr(one, "offload", True):
            continue  # another's hook, or one that moves inputs only
        recurse = getattr(one, "place_submodules", True)
        if not hasattr(one, "offload") or any(p.is_meta for p in module.parameters(recurse=recurse)):
            return True
    return False
