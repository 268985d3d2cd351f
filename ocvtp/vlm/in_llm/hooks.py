"""Hooks on a language model and its layers. Nothing of the model is replaced, nothing of upstream copied.

A hook before the language model opens a call, one after it closes the call; hooks before its layers, from
the one before the first cut on, change what those get. Where nothing is dropped, nothing is changed. Layer 0
holds the whole prompt, so that ``generate`` slices, numbers and masks as ever.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.methods.in_llm.contract import Method
from ocvtp.vlm.in_llm.fitting import fit
from ocvtp.vlm.in_llm.later import Later
from ocvtp.vlm.in_llm.masks import MaskMaker, seen_by_last
from ocvtp.vlm.in_llm.prefill import Prefill, Seen
from ocvtp.vlm.in_llm.stages import leave, trace_of

_PIXELS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


@dataclass(frozen=True)
class Expected:
    """What is known of the next prompt before its call comes.

    Attributes:
        length: columns; drafts of assisted generation come behind them. ``None``: as many as come.
        vision: ``[B, L]`` bool, where no ids will say where vision tokens are.
    """

    length: int | None = None
    vision: torch.Tensor | None = None


class Hooks:
    """A method on a model.

    Args:
        model: the ``...ForConditionalGeneration``, or a language model alone.
        method: its settings.
        placeholders: ids of vision tokens.

    Raises:
        ValueError: a method that can't work on this language model.
    """

    owned = False
    """Whether :func:`ocvtp.apply` put them on."""

    def __init__(self, model: Any, method: Method, placeholders: Sequence[int]) -> None:
        decoder, self.numbering = fit(model, method)
        self._decoder = decoder
        self.method, self.placeholders = method, tuple(placeholders)
        self._owner: Any = model
        self._masks = MaskMaker(decoder.text)
        self._signature = inspect.signature(type(decoder.text).forward)
        #: What happens at every cut is put here, if it is a list. It keeps whole batches alive.
        self.seen: list[Seen] | None = None
        self._forget()
        self._handles: list[Any] = []
        try:
            self._put_on()
        except BaseException:
            self._take_off()
            raise

    def _forget(self) -> None:
        """What belongs to calls."""
        self._local = threading.local()
        self._out: set[int] = set()  # threads that are inside
        self._gone = False

    def _put_on(self) -> None:
        text, first = self._decoder.text, self.method.cuts[0]
        self._handles += [
            text.register_forward_hook(self._end, always_call=True),
            text.register_forward_pre_hook(self._begin, with_kwargs=True),
        ]
        if self.method.cuts[-1] == self._decoder.depth:
            self._handles.append(text.norm.register_forward_pre_hook(self._last))
        for number, layer in enumerate(text.layers):
            if number >= first - 1:
                # No closure: a copy of the model gets hooks of its own, with its own layers.
                hook = functools.partial(self._layer, number)
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self._decoder.merger is not None:
            merger = self._decoder.merger
            self._handles += [
                merger.register_forward_hook(self._unplaced, always_call=True),
                merger.register_forward_pre_hook(self._placed, with_kwargs=True),
            ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        """For a copy of the model. On a copy of a part of it alone they do nothing."""
        twin = memo[id(self)] = object.__new__(type(self))
        whole = self._owner is not None and id(self._owner) in memo
        for name, value in self.__dict__.items():
            if name not in ("_local", "_out", "_gone", "seen"):
                twin.__dict__[name] = copy.deepcopy(value, memo) if whole else None
        twin.seen = None
        twin._forget()
        return twin

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            "a model with hooks that drop tokens inside its language model can't be pickled: take them off "
            "first"
        )

    def remove(self) -> None:
        """Take the hooks off; as soon as every call that is inside is back."""
        self._gone = True
        if not self._out:
            self._take_off()

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextlib.contextmanager
    def expecting(self, length: int | None = None, vision: torch.Tensor | None = None) -> Iterator[None]:
        """While calls on one prompt are made, tell of it what they don't say.

        Args:
            length: columns of the prompt, without the drafts of assisted generation.
            vision: ``[B, L]`` bool, where embeddings come without ids.
        """
        before = getattr(self._local, "expected", None)
        self._local.expected = Expected(length, vision)
        outer = self._enter()
        try:
            yield
        finally:
            self._local.expected = before
            if outer:
                self._leave()

    @property
    def told(self) -> bool:
        """Whether somebody in this thread is :meth:`expecting`."""
        return getattr(self._local, "expected", None) is not None

    # ------------------------------------------------------------------------------------------- the hooks

    def _placed(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before embeddings and image features are put together: where the latter go."""
        if kwargs is None or self._owner is None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._local.placed = None
        if isinstance(ids, torch.Tensor) and any(_brings(kwargs.get(name)) for name in _PIXELS):
            placed = ids == self.placeholders[0] if self.placeholders else torch.zeros_like(ids).bool()
            for one in self.placeholders[1:]:
                placed = placed | (ids == one)
            self._local.placed = placed

    def _unplaced(self, *_: Any) -> None:
        """After it, or where it failed before the language model was called."""
        self._local.placed = None

    def _begin(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # PyTorch gives a hook no keyword arguments until a moment after it is put on.
        if kwargs is None or self._owner is None:
            return
        placed = getattr(self._local, "placed", None)
        self._local.placed, self._local.call = None, None
        if self._gone and threading.get_ident() not in self._out:
            return
        bound = self._signature.bind_partial(text, *args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        call = self._call(given, placed)
        if call is not None:
            self._local.call, self._local.entered = call, self._enter()

    def _call(self, given: Mapping[str, Any], placed: torch.Tensor | None) -> Prefill | Later | None:
        embeddings, ids = given.get("inputs_embeds"), given.get("input_ids")
        shown = embeddings if embeddings is not None else ids
        if shown is None:
            return None  # upstream says so
        batch, length = shown.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        trace = trace_of(cache)
        if trace is not None and not past:  # a static cache that is used again
            leave(cache, None)
            trace = None
        vision = self._vision(placed, past, batch, length)
        if vision is not None and past:
            raise ValueError(
                "an image behind a cache that holds something already: tokens are dropped inside the "
                "language model once, where the whole prompt is read"
            )
        if vision is None and trace is None:
            return None
        live = seen_by_last(given.get("attention_mask"), cache, past + length)
        if trace is not None:
            return Later(self._decoder, self._masks, cache, trace.behind(cache, past, batch), past, live)
        assert vision is not None
        text = self._decoder.text
        if text.training and getattr(text, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs layers again without what they were given: it can't be combined "
                "with dropping tokens inside the language model"
            )
        expected = getattr(self._local, "expected", None)
        said = length if expected is None or expected.length is None else min(expected.length, length)
        states = embeddings if embeddings is not None else text.embed_tokens(ids)
        return Prefill(
            self._decoder,
            self._masks,
            self.method,
            self.numbering,
            cache,
            vision.to(states.device),
            live,
            said,
            states,
            self.seen,
        )

    def _vision(self, placed: torch.Tensor | None, past: int, batch: int, length: int) -> torch.Tensor | None:
        """``[B, L]`` bool of a prompt's vision tokens; ``None`` for a call without any."""
        if placed is None:
            expected = getattr(self._local, "expected", None)
            placed = None if expected is None or past else expected.vision
            if placed is not None and placed.shape[1] < length:  # drafts of assisted generation
                placed = torch.nn.functional.pad(placed, (0, length - placed.shape[1]))
        # A placeholder that the model said itself brings no features. Behind a cache, the device is asked.
        if placed is None or (past and not bool(placed.any())):
            return None
        if placed.shape[1] != length or batch % placed.shape[0]:
            raise ValueError(
                f"the language model got {batch} rows of {length} columns, and image tokens are known of "
                f"{placed.shape[0]} rows of {placed.shape[1]}: a prompt in chunks, or with trained columns "
                "in front, can't have tokens dropped inside the language model"
            )
        return placed.repeat_interleave(batch // placed.shape[0], 0)

    def _layer(self, number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        call: Prefill | Later | None = getattr(self._local, "call", None)
        if call is None or kwargs is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        new, arguments = call.layer(number, hidden, kwargs)
        if args:
            return (new, *args[1:]), arguments
        return args, {**arguments, "hidden_states": new}

    def _last(self, _: Any, args: tuple[Any, ...]) -> Any:
        call: Prefill | Later | None = getattr(self._local, "call", None)
        return None if call is None else (call.end(args[0]),)

    def _end(self, _: Any, args: Any, output: Any) -> None:
        call: Prefill | Later | None = getattr(self._local, "call", None)
        if call is None:
            return
        self._local.call = None
        if self._local.entered:
            self._leave()
        if isinstance(call, Prefill) and output is not None:
            cache = call.cache if call.cache is not None else getattr(output, "past_key_values", None)
            leave(cache, call.trace)

    # ---------------------------------------------------------------------------------------- who is inside

    def _enter(self) -> bool:
        """Whether this thread wasn't inside before."""
        if torch.compiler.is_compiling() or threading.get_ident() in self._out:
            return False
        self._out.add(threading.get_ident())
        return True

    def _leave(self) -> None:
        self._out.discard(threading.get_ident())
        if self._gone and not self._out:
            self._take_off()


def _brings(pixels: Any) -> bool:
    """Whether an argument brings image features along: with a text, ``generate`` brings an empty dict."""
    return bool(pixels) if isinstance(pixels, Mapping) else pixels is not None
