"""State of one patched model, and how to find it."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ocvtp.vlm.call.named import by_name, positional_names
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.errors import PatchError, UnsupportedModelError
from ocvtp.vlm.contracts.pixels import pixels_in
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.encode.timing import Clock

#: Where a patched model keeps its controller.
ATTRIBUTE = "_ocvtp"


class Controller:
    """State of one patched model.

    A plain object in the instance's ``__dict__``: no module, so nothing of it (the pruner least of all) gets
    into ``state_dict``, ``save_pretrained``, ``parameters`` or quantisation.

    Args:
        model: the ``...ForConditionalGeneration``.
        adapter: of its family.
        settings: what the user chose.
        names: of the methods that are patched.
    """

    def __init__(self, model: Any, adapter: Adapter, settings: Settings, names: Iterable[str]) -> None:
        names = tuple(names)
        self.model = model
        self.adapter = adapter
        self.settings = settings
        self.enabled = True
        self.clock: Clock | None = None
        #: The class's own methods, bound. A deep copy of the model rebinds them.
        self.originals = {name: types.MethodType(getattr(type(model), name), model) for name in names}
        #: By the number of a patched method: the instance attribute that it was put over, if there was one
        #: (accelerate's or torch.compile's wrapper).
        self.previous: dict[int, Any] = {}
        #: What catches calls that go around the patched methods.
        self.around: Any = None
        self._names = {name: positional_names(getattr(type(model), name)) for name in names}

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """For a copy of the model: it has a patch of its own."""
        twin = memo[id(self)] = object.__new__(type(self))
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def __reduce__(self) -> Any:
        """Methods of an instance don't survive pickling: the copy would silently not be pruned."""
        if not self.enabled:  # the copy has none of ours that could ask for it
            return type(None), ()
        raise pickle.PicklingError(
            "a model patched by ocvtp can't be pickled: ocvtp.remove(model) first, and apply to the copy"
        )

    def below(self, name: str, number: int) -> Any:
        """The bound method that a patched method lies on."""
        previous = self.previous.get(number)
        return self.originals[name] if previous is None else previous

    def argument(self, method: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One argument of a call, by position or by name."""
        if name in kwargs:
            return kwargs[name]
        return self.by_name(method, args, {}).get(name) if args else None

    def by_name(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call, by name."""
        return by_name(method, self._names[method], args, kwargs)

    def of_images(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What describes images among a processor's inputs: the arguments of :func:`ocvtp.vlm.select`."""
        names = (self.adapter.pixel_keys["image"], *self.adapter.vision_keys)
        return {name: inputs[name] for name in names if name in inputs}

    def has_pixels(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call brings pixels along."""
        return bool(pixels_in(self.adapter, self.by_name(method, args, kwargs)))


def controller_of(model: Any) -> Controller:
    """The controller of a patched model.

    Raises:
        PatchError: there is none, or it is switched off.
    """
    controller = unwrap(model).__dict__.get(ATTRIBUTE)
    if controller is None or not controller.enabled:
        raise PatchError("this model is not patched; call ocvtp.apply(model, pruner) first")
    return controller


def unwrap(model: Any) -> Any:
    """The model inside ``torch.compile`` and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(f"can't prune a {type(model).__name__}: not a torch.nn.Module")
    return model
