"""A device that is not there, with values: what runs on the host and what would have to wait for a GPU.

A :class:`Remote` tensor says that it lies on ``meta`` and holds its values on the CPU. Whatever the host
wants to know of it can be counted, and is answered. Tensors that a program makes on the host stay there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from bench.guard.watch import copies_and_waits, copies_from_host, needs_value

_DEVICE = torch.device("meta")
_HOST = torch.device("cpu")


class Remote(torch.Tensor):
    """A tensor of the device that is not there; without gradients. For use within :func:`remote_device`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[Remote], held: torch.Tensor) -> Remote:
        """A tensor that looks like ``held`` but for its device."""
        made: Remote = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class RemoteDevice(TorchDispatchMode):
    """What operators do; see :func:`remote_device`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`torch.utils._python_dispatch.TorchDispatchMode`."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        remote = any(isinstance(tensor, Remote) for tensor in tensors)
        result = _run(func, args, kwargs)
        if (remote and needs_value(func, args, kwargs)) or copies_and_waits(
            func, args, kwargs, tensors, result
        ):
            self.waits[str(func.name()).removesuffix(".default")] += 1
        return result


class _Functions(TorchFunctionMode):
    """What copies to a device, or from it, where no operator is seen: ``torch.tensor``, ``tolist``, ..."""

    _TAKE = (torch.Tensor.tolist, torch.Tensor.__format__, torch.Tensor.__repr__)
    _MAKE = (torch.tensor, torch.as_tensor, torch.asarray)

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        remote = bool(args) and isinstance(args[0], Remote)
        if remote and func in self._TAKE:
            self._waits[func.__name__] += 1
            return func(args[0].held, *args[1:], **kwargs)
        device = kwargs.get("device")
        if not remote and func in self._MAKE and device is not None and torch.device(device) == _DEVICE:
            made = func(*args, **{**kwargs, "device": _HOST})
            self._waits[func.__name__] += int(made.numel() > 0)
            return Remote(made)
        if remote and copies_from_host(func, args, kwargs):
            self._waits[func.__name__] += 1
            if func is torch.Tensor.new_tensor:
                return Remote(func(args[0].held, *args[1:], **kwargs))
            args = (args[0], _on_device(args[1]), *args[2:])
        return func(*args, **kwargs)


def _on_device(index: Any) -> Any:
    """An index with its lists of numbers on the device."""
    if isinstance(index, tuple):
        return tuple(_on_device(part) for part in index)
    plain = index is None or index is ... or isinstance(index, int | slice | torch.Tensor)
    return index if plain else Remote(torch.as_tensor(index))


@contextlib.contextmanager
def remote_device() -> Iterator[Counter[str]]:
    """Compute with :class:`Remote` tensors, and make them where ``device="meta"`` is asked for.

    Yields:
        How often the host waits for the device, by operator.
    """
    mode = RemoteDevice()
    with mode, _Functions(mode.waits):
        yield mode.waits


def move(module: torch.nn.Module) -> torch.nn.Module:
    """Put parameters and buffers of ``module`` on the device, without gradients."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(Remote(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Remote(buffer)
    return module


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    remote = device == _DEVICE or (
        device is None and any(isinstance(leaf, Remote) for leaf in tree_iter((args, kwargs)))
    )
    inner = tree_map_only(Remote, lambda tensor: tensor.held, (args, kwargs))
    if device is not None:
        inner[1]["device"] = _HOST
    result = func(*inner[0], **inner[1])
    if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor) and result is inner[0][0]:
        return args[0]
    return tree_map_only(torch.Tensor, Remote, result) if remote else result
