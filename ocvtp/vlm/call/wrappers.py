"""What lies around a method of one instance: whose function it is, and what it says it wraps."""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Iterator
from typing import Any

# Their wrappers call what they wrap, with the arguments they were called with.
_TRANSPARENT = ("accelerate", "torch")


_NUMBERS = itertools.count()
_OURS: weakref.WeakKeyDictionary[types.FunctionType, int] = weakref.WeakKeyDictionary()


def number(function: types.FunctionType) -> int:
    """Make a function one of ours: a number of its own."""
    _OURS[function] = mine = next(_NUMBERS)
    return mine


def number_of(layer: Any) -> int | None:
    """The number of one of our functions; ``None`` for others, also for those that copied its attributes."""
    return _OURS.get(layer) if isinstance(layer, types.FunctionType) else None


def living() -> set[int]:
    """The numbers of our functions that somebody still holds."""
    return set(_OURS.values())


def layers(method: Any) -> Iterator[tuple[Any, Any]]:
    """A method and what it visibly wraps, from the outside in, each with the object it is bound to.

    A wrapper that tells nothing of what it wraps ends the walk; so does a function that wraps nothing.
    """
    owner, seen = None, set()
    while method is not None and id(method) not in seen:
        seen.add(id(method))
        if isinstance(method, types.MethodType):
            owner, method = method.__self__, method.__func__
            continue
        yield method, owner
        method = _inside(method)


def is_transparent(layer: Any) -> bool:
    """Whether a layer only calls what it wraps: accelerate's hooks, autocast, ``torch.compile``."""
    return is_transparent_module(_module(layer))


def is_transparent_module(name: str) -> bool:
    """Whether the functions of a module are such layers."""
    return name.partition(".")[0] in _TRANSPARENT


def is_own(layer: Any, cls: type, name: str) -> bool:
    """Whether a layer is the class's method ``name``, or what its decorators have around it."""
    return any(layer is own for own, _ in layers(getattr(cls, name)))


def foreign_layer(method: Any, cls: type, name: str) -> Any:
    """The outermost layer of a method on an instance that is nobody's we know, if there is one."""
    for layer, _ in layers(method):
        if is_own(layer, cls, name):
            return None
        if not is_transparent(layer) and number_of(layer) is None:
            return layer
    return None


def label(layer: Any) -> str:
    """``module.qualname`` of the code that runs: ``functools.wraps`` copies the names of what is wrapped."""
    code = getattr(_function(layer), "__code__", None)
    if code is None:
        return f"{_module(layer)}.{type(layer).__qualname__}"
    return f"{_module(layer)}.{getattr(code, 'co_qualname', code.co_name)}"  # the former from Python 3.11 on


def _inside(layer: Any) -> Any:
    """What a layer says it wraps, else ``None``."""
    for name in ("_torchdynamo_orig_callable", "__wrapped__"):
        inside = getattr(layer, "__dict__", {}).get(name)
        if inside is not None:
            return inside
    return layer.func if isinstance(layer, functools.partial) else None


def _function(layer: Any) -> Any:
    """The function that a layer runs: accelerate binds the module with ``functools.partial``."""
    while isinstance(layer, functools.partial):
        layer = layer.func
    return layer


def _module(layer: Any) -> str:
    """Where the code of a layer is from."""
    function = _function(layer)
    names = getattr(function, "__globals__", None)
    return str(names["__name__"] if names is not None and "__name__" in names else type(function).__module__)
