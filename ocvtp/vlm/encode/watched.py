"""Whether modules are what they were when a graph of them was recorded."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Modules as they are now. Values of their weights don't matter: a graph reads them where they are.

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
        self._modules = [module for part in (*parts, *folded) for module in part.modules()]
        self._alone = list(alone)
        self._tensors = [
            tensor
            for module in (*self._modules, *self._alone)
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        self._folded = [tensor for part in folded for tensor in (*part.parameters(), *part.buffers())]
        self._then = self._now()

    def same(self) -> bool:
        """Whether they are what they were, as far as it shows."""
        return self._now() == self._then

    def wants_gradients(self) -> bool:
        """Whether any of their weights does."""
        return any(tensor.requires_grad for tensor in self._tensors)

    def _now(self) -> list[object]:
        # Ids are of objects that are held here, so that they don't come back. As little Python as possible:
        # this is done for some hundred modules in every call.
        found: list[object] = []
        for module in self._modules:
            state = module.__dict__
            hooked = state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
            found.append(state["training"] or bool(hooked))
            for name in ("_modules", "_parameters", "_buffers"):
                found.extend(map(id, state[name].values()))
        for module in self._alone:
            found.extend(map(id, module._parameters.values()))
        found.extend(tensor.data_ptr() for tensor in self._tensors)
        found.extend(-1 if tensor.is_inference() else tensor._version for tensor in self._folded)
        return found
