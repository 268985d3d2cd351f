"""What a call does on a GPU, seen without one: memory it allocates, times it makes the host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ocvtp_kernels._library import launchers

_FRESH = ("empty", "new_empty")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_MAKE = (torch.tensor, torch.as_tensor, torch.asarray)


class HostSyncError(RuntimeError):
    """A call wants the value of a tensor without data; the message names the operator."""


@dataclass(frozen=True)
class Allocation:
    """A new storage, as the first tensor in it had it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class Watch(TorchDispatchMode):
    """Notes what operators allocate and which of them wait for the device.

    Tensors may lie on ``meta``, where the operators of ``ocvtp_kernels`` run their launchers; with
    :func:`ocvtp_kernels._launch.recording` around it no kernel runs. Values are not checked there, no more
    than on a GPU (:func:`ocvtp_kernels._checks.require`).

    Attributes:
        allocated: in order. Memory that an operator of PyTorch has inside and gives back is not seen.
        waits: operator -> how often it made the host wait. One that needs values, which are not there, raises
            :class:`HostSyncError`.
        operators: how many operators of PyTorch computed something, that is, neither made a view nor empty
            memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Allocation] = []
        self.waits: Counter[str] = Counter()
        self.operators = 0
        self._launchers = launchers()
        # Held, so that no address comes back while it is watched.
        self._known: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._learn((args, kwargs))
        name = str(func.name()).removesuffix(".default")
        tensors = list(_tensors((args, kwargs)))
        on_meta = any(tensor.is_meta for tensor in tensors)
        launcher = self._launchers.get(name)
        if launcher is not None and on_meta:
            with self:
                result = launcher(*args, **kwargs)
        else:
            if on_meta and needs_value(func, args, kwargs):
                self.waits[name] += 1
                raise HostSyncError(f"{name} waits for the device")
            result = func(*args, **kwargs)
            if copies_and_waits(func, args, kwargs, tensors, result):
                self.waits[name] += 1
            if launcher is None and not func.is_view and not func._opname.startswith(_FRESH):
                self.operators += 1
        self.allocated += self._learn(result)
        return result

    def _learn(self, tree: Any) -> list[Allocation]:
        """Remember the storages in ``tree``; those that were new and are not empty."""
        new = []
        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage
                if storage.nbytes():
                    new.append(Allocation(tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        return new


def needs_value(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host has to know values, or how many of them there are, before it can go on."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    name = func._opname
    if name in _INDEXING:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        # A single value is filled in without counting the places.
        return bool(masks) and (name == "index" or args[2].numel() != 1)
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return False
    return torch.Tag.dynamic_output_shape in func.tags


def copies_and_waits(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], result: Any
) -> bool:
    """Whether it copies between host and device and blocks."""
    if func._opname in _INDEXING:  # indices that lie elsewhere are copied, and waited for
        return any(index is not None and index.device != args[0].device for index in args[1])
    if func._opname not in ("_to_copy", "copy_", "copy") or kwargs.get("non_blocking"):
        return False
    devices = {tensor.device.type for tensor in (*tensors, *_tensors(result))}
    return len(devices) > 1


class Functions(TorchFunctionMode):
    """Notes copies from the host that PyTorch makes below its operators, where :class:`Watch` sees none.

    Args:
        waits: function -> how often it made the host wait; counted on.
    """

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if copies_from_host(func, args, kwargs):
            self._waits[func.__name__] += 1
        return func(*args, **kwargs)


def copies_from_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function of PyTorch copies numbers of the host to the device, which blocks.

    These are ``torch.tensor([1, 2], device=device)`` and its like, ``x[[1, 2]]``, and on CUDA also
    ``x[indices] = 1.0``, which makes a tensor of the number first.
    """
    if func in _MAKE:
        device = kwargs.get("device")
        away = device is not None and torch.device(device).type != "cpu"
        return away and not (isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu")
    if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type == "cpu":
        return False
    if func is torch.Tensor.new_tensor:
        return True
    if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        return False
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(part, list | range) or type(part).__module__ == "numpy" for part in parts):
        return True
    if func is torch.Tensor.__getitem__ or isinstance(args[2], torch.Tensor):
        return False
    return any(isinstance(part, torch.Tensor) and part.dtype != torch.bool for part in parts)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
