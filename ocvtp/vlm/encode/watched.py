"""Whether modules are what they were when a graph of them was recorded."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence

import torch

from ocvtp.vlm.contracts.weights import is_minded, is_plain


def why_unsteady(parts: Sequence[torch.nn.Module], *, training: bool = False) -> str | None:
    """Why modules can't be recorded; ``None`` if they can.

    What they compute has to be their weights and their classes' own ``forward``. A replay asks nobody else.

    Args:
        parts: modules with all that is in them.
        training: whether they may be in training mode, since that may end before they are recorded.
    """
    for part in parts:
        if is_minded(part):
            return "accelerate or FSDP brings its weights when it is called"
        if not is_plain(part):
            return "some of its layers are neither PyTorch's nor transformers' own: adapters, quantised ones"
        for module in part.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return "there are forward hooks on its layers, which a replay would not call"
            if module.training and not training:
                return "it is in training mode"
    found = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in found):
        return "some of its weights are tensors of a kind of their own"
    if len({tensor.device for tensor in found if tensor.numel()}) > 1:
        return "it lies on several devices"
    return None


class Watched:
    """Modules as they are now, of which :func:`why_unsteady` finds nothing to say.

    Values of their weights don't matter: a graph reads them where they are.

    Args:
        parts: modules with all that is in them.
        alone: modules without, of which only their own weights matter.
        folded: modules of whose weights a graph reads what was made of them, so that values matter too.
    """

    def __init__(
        self,
        parts: Sequence[torch.nn.Module],
        alone: Sequence[torch.nn.Module] = (),
        folded: Sequence[torch.nn.Module] = (),
    ) -> None:
        modules = [module for part in (*parts, *folded) for module in part.modules()]
        # Dictionaries of the modules, not copies of them.
        self._states = [module.__dict__ for module in modules]
        self._hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        inside = [found for one in modules for found in (one._modules, one._parameters, one._buffers)]
        self._inside: list[Mapping[str, object]] = [found for found in inside if found]
        self._inside += [one._parameters for one in alone]
        members = itertools.chain.from_iterable(found.values() for found in self._inside)
        # Held, so that the ids of others are others.
        self._members = list(members)
        self._tensors = [one for one in self._members if isinstance(one, torch.Tensor)]
        self._folded = [tensor for part in folded for tensor in (*part.parameters(), *part.buffers())]
        self._then = self._now()

    def same(self) -> bool:
        """Whether they are what they were, as far as it shows, and nobody wants to be asked."""
        return self._now() == self._then and not (
            any(self._hooks)
            or any(map(operator.itemgetter("training"), self._states))
            or any("forward" in state for state in self._states)
        )

    def wants_gradients(self) -> bool:
        """Whether any of their weights does."""
        return any(tensor.requires_grad for tensor in self._tensors)

    def _now(self) -> tuple[object, ...]:
        # Little of this is Python's own work, since it is done for some hundred modules in every call.
        members = itertools.chain.from_iterable(found.values() for found in self._inside)
        return (
            list(map(id, members)),
            list(map(torch.Tensor.data_ptr, self._tensors)),
            [-1 if tensor.is_inference() else tensor._version for tensor in self._folded],
        )
