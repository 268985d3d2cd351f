"""Calls that bring pixels to the model inside without having come through the patched ``forward``.

A trainer's fused loss calls ``model.model`` itself, from the caller or from a ``forward`` of its own, and
keeps the labels outside. Such a call runs on the short sequence too; the states it returns are those of the
long one, so that labels and masks go on fitting them.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from typing import Any

import torch

from ocvtp.vlm.call.controller import Controller, unwrap
from ocvtp.vlm.call.generation import pad_token_id
from ocvtp.vlm.call.inside import under_way
from ocvtp.vlm.call.memory import CacheNote, note_of, prefix_of, write_note
from ocvtp.vlm.call.named import by_name, positional_names
from ocvtp.vlm.call.prompt import identity, short_columns
from ocvtp.vlm.call.shorten import shorten
from ocvtp.vlm.call.under_way import UnderWay, lock
from ocvtp.vlm.call.weighing import hold_weights, with_running_weights, with_weights
from ocvtp.vlm.call.wrappers import foreign_layer, is_transparent_module, label
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.contracts.pixels import pixels_in


class Handed(dict[str, Any]):
    """``mm_encoder_outputs`` of a call that was shortened here.

    Attributes:
        around: whose hooks shortened it.
        note: what the cache will hold; ``None`` if no column changed.
        columns: ``[B, long]``, for every column of the call the short one whose states it gets; or ``None``.
    """

    around: Around | None = None
    note: CacheNote | None = None
    columns: torch.Tensor | None = None


class Around:
    """Two hooks on the inner model: one shortens the call, the other spreads its states out again.

    Args:
        controller: of the patched model. A deep copy of that has hooks of its own, with its own controller.
            On a copy of the inner model alone they do nothing: nobody could take them off.
        inner: the module whose ``forward`` takes ids and pixels.
    """

    _controller: Controller | None

    def __init__(self, controller: Controller, inner: torch.nn.Module) -> None:
        self._controller = controller
        self.inner = inner
        self._names = positional_names(type(inner).forward)
        self._out = UnderWay(self._settle)  # calls that were shortened and have not come back
        self._gone = False
        self._spreading = inner.register_forward_hook(self.spread, with_kwargs=True)
        try:
            self._shortening = inner.register_forward_pre_hook(self.shorten, with_kwargs=True)
        except BaseException:
            self._spreading.remove()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Around:
        twin = memo[id(self)] = object.__new__(type(self))
        whole = self._controller is not None and id(self._controller.model) in memo
        for name, value in self.__dict__.items():
            if name == "_out":  # calls of the one copied
                continue
            twin.__dict__[name] = copy.deepcopy(value, memo) if whole else None
        twin._out = UnderWay(twin._settle)
        return twin

    def __reduce__(self) -> Any:
        return _without_controller, ()

    def remove(self) -> None:
        """Take the hooks off; the one that spreads as soon as every call that was shortened is back."""
        with lock:
            self._gone = True
            self._shortening.remove()
            self._settle()

    def _settle(self) -> None:
        with lock:
            if self._gone and not self._out:
                self._spreading.remove()

    def _hand_out(self, handed: Handed) -> bool:
        """Begin a call that :meth:`spread` will end; false if nobody would any more."""
        handed.around = self
        if torch.compiler.is_compiling():  # it can't trace what comes, and threads don't matter to it
            return True
        with lock:
            if not self._gone:
                self._out.hold(handed)
            return not self._gone

    def shorten(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """The same call on the pruned prompt; ``None`` for one without pixels or with features handed over.

        Raises:
            PatchError: it can't be shortened.
        """
        controller = self._controller
        # PyTorch gives a hook no keyword arguments until a moment after it is put on.
        if controller is None or not controller.enabled or kwargs is None:
            return None
        given = by_name(f"{type(self.inner).__name__}.forward", self._names, args, kwargs)
        adapter, settings = controller.adapter, controller.settings
        pixels = bool(pixels_in(adapter, given))
        if settings.inside is not None and pixels and not under_way(controller):
            raise _refusal(controller.model, "its states would be of fewer columns than it was given")
        if not settings.before:
            return None
        cache = given.get("past_key_values")
        note = note_of(cache)
        if (note is None and not pixels) or given.get("mm_encoder_outputs") is not None:
            weighed = with_running_weights(controller, given, kwargs)
            return None if weighed is kwargs else (args, weighed)
        ids = given.pop("input_ids", None)
        if pixels and given.get("inputs_embeds") is not None:
            raise _refusal(controller.model, "pass input_ids instead of inputs_embeds")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:  # upstream says so
            return None
        if settings.route != "mm_encoder_outputs":
            raise _refusal(controller.model, "pruning that needs transformers >= 5.18")
        returned = given.get("return_dict")
        if not (controller.model.config.return_dict if returned is None else returned):
            raise _refusal(controller.model, "pass return_dict=True")
        if given.get(
            "output_router_logits"
        ):  # those of the short sequence, which no mask of the long one fits
            raise _refusal(controller.model, "pass output_router_logits=False")
        prefix, hold = prefix_of(cache, ids.shape[0], ids.device), hold_weights(controller)
        call = shorten(
            adapter,
            settings,
            ids,
            given,
            prefix,
            controller.clock,
            generating=False,
            calling=(controller.model, self.inner),
            pad_token_id=pad_token_id(controller.model, given),
        )
        handed = Handed(call.arguments.get("mm_encoder_outputs") or {})
        if not self._hand_out(handed):  # another thread has taken the patch off since
            return None
        handed.note = call.note
        if call.note is not None:
            handed.columns = spread_columns(call.index, ids.shape[1])
        # Nobody tells of a call that fails. Until it is back, the cache keeps the note of what was in it, or
        # one that lets nobody go on with what the call leaves there.
        if cache is not None and prefix is None:
            write_note(cache, CacheNote(identity(ids.shape[0], 0, 0, ids.device), 0, None))
        arguments = with_weights(call.arguments, call.note, hold)
        return (), {**arguments, "input_ids": call.ids, "mm_encoder_outputs": handed}

    def spread(self, _: Any, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        """States of the long sequence; what :meth:`shorten` left alone stays as it is."""
        if len(kwargs_and_output) == 1:  # without keyword arguments, see there: nothing is handed out yet
            return None
        kwargs, output = kwargs_and_output
        handed = kwargs.get("mm_encoder_outputs")
        if not isinstance(handed, Handed) or handed.around is not self:
            return None
        if output.past_key_values is not None:
            write_note(output.past_key_values, handed.note)
        if handed.columns is not None:
            output.last_hidden_state = _take(output.last_hidden_state, handed.columns)
            if output.hidden_states is not None:
                output.hidden_states = tuple(_take(each, handed.columns) for each in output.hidden_states)
        return output


def _without_controller() -> Around:
    """For a pickled inner model."""
    made = object.__new__(Around)
    made._controller = None
    return made


def _refusal(model: Any, advice: str) -> PatchError:
    foreign = foreign_layer(model.__dict__.get("forward"), type(model), "forward")
    who = _caller(model) if foreign is None else f"{label(foreign)}, which replaced its forward,"
    return PatchError(
        f"{who} called the model inside this {type(model).__name__} with pixels, around the patched "
        f"forward: {advice}, call the model itself, or ocvtp.remove(model)"
    )


def inner_of(controller: Controller) -> torch.nn.Module | None:
    """The module of a model whose ``forward`` takes ids and pixels, if it has one."""
    keys = set(controller.adapter.pixel_keys.values())
    for child in controller.model.children():
        module: torch.nn.Module = unwrap(child)
        parameters = inspect.signature(type(module).forward).parameters
        if "input_ids" in parameters and keys & set(parameters):
            return module
    return None


def spread_columns(index: torch.Tensor, long: int) -> torch.Tensor:
    """``[B, long]``: for every column of the long call the last short one at or before it.

    That one's state has seen all that the long column may see and that was kept, so a loss that is told what
    comes next is the one of the short sequence.

    Args:
        index: ``[B, short]`` long column of every short one, -1 for padding.
        long: columns that the call would have had.
    """
    return short_columns(index, long).clamp(min=0).cummax(1).values


def _take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    index = columns.to(states.device, non_blocking=True)[:, :, None]
    return states.gather(1, index.expand(-1, -1, states.shape[2]))


def _caller(model: Any) -> str:
    """Who called the inner model: the first that is neither torch nor accelerate nor the model itself."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        place = str(frame.f_globals.get("__name__", ""))
        if place != __name__ and not is_transparent_module(place) and frame.f_locals.get("self") is not model:
            code = frame.f_code
            return f"{place}.{getattr(code, 'co_qualname', code.co_name)} (line {frame.f_lineno})"
        frame = frame.f_back
    return "Someone"
