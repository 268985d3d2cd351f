"""Our methods on one instance: put on, found again under what others put on top, taken off.

Every method that is put on has a number, and under that number the controller remembers what it lies on. So
a method that somebody kept, wrapped or put back never has to ask the instance what to call, which may be
itself. It is recognised as a function, not by an attribute: ``functools.wraps`` copies those onto wrappers.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from ocvtp.vlm.call.controller import ATTRIBUTE, Controller
from ocvtp.vlm.call.inner import Around, inner_of
from ocvtp.vlm.call.weighing import settle_weights
from ocvtp.vlm.call.wrappers import foreign_layer, label, layers, living, number, number_of
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.in_llm import settle
from ocvtp.vlm.replicas import allow_replicas, refuse_replicas

#: ``(controller, what the method lies on, args, kwargs)`` -> what the method returns.
Run = Callable[[Controller, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def install(model: Any, adapter: Adapter, settings: Settings, runs: Mapping[str, Run]) -> None:
    """Put a method of each name on the instance, or switch on those that are there, all or nothing.

    Raises:
        PatchError: somebody else's method is there, of which it can't be told that it calls ours.
    """
    slots = {name: model.__dict__.get(name) for name in runs}
    missing = [name for name, slot in slots.items() if _ours_in(slot, model, name) is None]
    _refuse_foreign(model, adapter, missing)
    controller = model.__dict__.get(ATTRIBUTE)
    if controller is None:
        controller = Controller(model, adapter, settings, tuple(runs))
    alive = living()
    previous = {mine: method for mine, method in controller.previous.items() if mine in alive}
    installed: dict[str, Any] = {ATTRIBUTE: controller}
    for name in missing:
        function, mine = _method(type(model), name, runs[name])
        previous[mine] = slots[name]
        installed[name] = types.MethodType(function, model)
    around, inner = controller.around, inner_of(controller)
    if inner is not None and (around is None or around.inner is not inner):
        around = Around(controller, inner)  # the last that can fail
        if controller.around is not None:
            controller.around.remove()
    controller.previous, controller.around = previous, around
    controller.adapter, controller.enabled = adapter, True
    model.__dict__.update(installed)
    resettle(model, controller, settings)
    refuse_replicas(model)


def resettle(model: Any, controller: Controller, settings: Settings) -> None:
    """Give a patched model other settings, whatever was put on top of it meanwhile."""
    adapter, method = controller.adapter, settings.inside
    settle(model, method, [adapter.token_id(one) for one in adapter.pixel_keys] if method is not None else ())
    controller.settings = settings
    settle_weights(model)


def uninstall(model: Any) -> None:
    """Take ours off where nothing is on top, and switch them off in any case.

    Raises:
        PatchError: a wrapper was copied along with the model and runs the one it was made for.
    """
    controller = model.__dict__.get(ATTRIBUTE)
    if controller is None:
        return
    for name in controller.originals:
        _ours_in(model.__dict__.get(name), model, name)
    controller.enabled = False
    if controller.around is not None:
        controller.around.remove()
        controller.around = None
    settle_weights(model)
    settle(model, None, ())
    allow_replicas(model)
    for name in controller.originals:
        slot = model.__dict__.get(name)
        while isinstance(slot, types.MethodType) and (found := number_of(slot.__func__)) is not None:
            slot = controller.previous.get(found)
        if slot is not None:
            model.__dict__[name] = slot
        else:
            model.__dict__.pop(name, None)
    if not any(name in model.__dict__ for name in controller.originals):
        del model.__dict__[ATTRIBUTE]


def _method(cls: type, name: str, run: Run) -> tuple[types.FunctionType, int]:
    """A function for the class's method ``name`` that asks the instance it is bound to, so copies rebind.

    accelerate takes its mixed precision off by going to the innermost ``__wrapped__``. Ours has another of
    ours there, which lies on the class's method, as everything between the two is then meant to be gone.
    """
    own = getattr(cls, name)
    inner, _ = _function(cls, name, run)
    functools.update_wrapper(inner, own)
    del inner.__wrapped__  # type: ignore[attr-defined]
    inner.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    outer, mine = _function(cls, name, run)
    # generate inspects the signature of forward. The class's function has it whatever sits on the instance.
    functools.update_wrapper(outer, own)
    outer.__wrapped__ = inner  # type: ignore[attr-defined]
    return outer, mine


def _function(cls: type, name: str, run: Run) -> tuple[types.FunctionType, int]:
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        controller = self.__dict__.get(ATTRIBUTE)
        if controller is None:  # somebody kept the method from before it was taken off
            return getattr(type(self), name)(self, *args, **kwargs)
        below = controller.below(name, mine)
        if not controller.enabled:
            return below(*args, **kwargs)
        return run(controller, below, args, kwargs)

    assert isinstance(patched, types.FunctionType)
    mine = number(patched)
    return patched, mine


def _ours_in(method: Any, model: Any, name: str) -> int | None:
    """The number of ours that a method of the instance visibly leads to."""
    for layer, owner in layers(method):
        found = number_of(layer)
        if found is not None:
            if owner is model:
                return found
            raise PatchError(
                f"{name} of this {type(model).__name__} was wrapped before the model was copied, and runs "
                f"the model that it was copied from: del model.{name} on the copy, and wrap its own method"
            )
    return None


def _refuse_foreign(model: Any, adapter: Adapter, names: list[str]) -> None:
    for path, module, name in [*((name, model, name) for name in names), *adapter.bypassed_methods()]:
        method = module.__dict__.get(name)
        foreign = foreign_layer(method, type(module), name)
        if foreign is None:
            continue
        found = f"{path} of this {type(model).__name__} was replaced by {label(foreign)}"
        if module is model and name in names:
            raise PatchError(
                f"{found}, and nobody knows what that does to a call that was shortened. Take it off, call "
                "ocvtp.apply, and put it on again: it then sees the calls that you make, and what it calls "
                "is pruned. A trainer that puts one on is made after ocvtp.apply"
            )
        raise PatchError(
            f"{found}; pruning would go around it, since it calls what is inside {path} itself. Take it off "
            "before ocvtp.apply, or remove the patch"
        )
