"""Weights inside the language model: log(how many tokens it stands for) on the logits of a kept token.

A call of ``forward`` brings the weights of its columns along as one more keyword argument, which every
model passes down to its attention modules. A hook there takes it off again and adds it to the mask, whatever
that is: nothing, booleans, numbers, another one per kind of layer. So weights go where the arguments go:
through gradient checkpointing, ``torch.compile`` and several threads.

``generate`` takes no argument of ours, and mostly makes the cache itself. The call in which it hands kept
rows over learns of their weights from a context variable and leaves them on the cache, where the hooks find
them from then on.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ocvtp.vlm.call.controller import ATTRIBUTE, Controller, unwrap
from ocvtp.vlm.call.memory import CacheNote, cached_length
from ocvtp.vlm.call.under_way import UnderWay, lock

#: The argument under which weights travel, and the attribute of a cache that holds them.
KEY = "ocvtp_weights"
_ON_CACHE = "_ocvtp_weights"
#: Numbers for flex attention are made for whole blocks of so many: torch 2.13 can't compile it on a CPU for
#: numbers whose size changes.
_FLEX_BLOCK = 128
_SERVED = ("sdpa", "eager", "flex_attention")


class Hold:
    """Keeps the hooks on a model while this lives: a call that began patched ends so, and a backward pass may
    come after :func:`ocvtp.remove`.
    """


#: Holds that live, by model.
_held: weakref.WeakKeyDictionary[Any, UnderWay] = weakref.WeakKeyDictionary()


def hold_weights(controller: Controller) -> Hold | None:
    """For a call that may have weights; nothing if they are off, or while something traces."""
    if not controller.settings.weigh or torch.compiler.is_compiling():
        return None
    model, hold = controller.model, Hold()
    with lock:
        if model not in _held:
            _held[model] = UnderWay(functools.partial(_let_go, weakref.ref(model)))
        _held[model].hold(hold)
        settle_weights(model)  # another thread may have taken the patch off, and the hooks with it
    return hold


class Weights:
    """What to add to the attention logits of a call's keys.

    Args:
        bias: ``[B, columns]`` float32, from the first cached column on; further columns weigh nothing. A call
            of more rows has those of each prompt one after another.
        hold: of the model they are for.
    """

    def __init__(self, bias: torch.Tensor, hold: Hold | None) -> None:
        self.bias = bias
        self._hold = hold
        #: The last mask made and what it was made of: most layers get the same.
        self._last: tuple[Any, tuple[Any, ...], torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return Weights(self.bias, self._hold)  # of a cache's copy, not of the model's

    def is_of(self, hold: Hold | None) -> bool:
        """Whether these are of the call that made ``hold``."""
        return self._hold is hold

    def behind(self, columns: int) -> Weights:
        """The same, of a sequence with that many columns more in front."""
        return Weights(pad(self.bias, (columns, 0)), self._hold) if columns else self

    def added(self, module: Any, hidden: torch.Tensor, mask: Any, cache: Any) -> torch.Tensor:
        """A mask of numbers ``[B, 1, queries, keys]`` in the place of ``mask``.

        Args:
            module: the attention module.
            hidden: its input ``[B, queries, D]``.
            mask: as it would get it.
            cache: before it is updated.
        """
        queries = hidden.shape[1]
        keys, offset = _keys(module, queries, mask, cache)
        of = (hidden.shape[0], queries, keys, offset, hidden.dtype, hidden.device)
        tracing = torch.compiler.is_compiling()
        last = None if tracing else self._last
        if last is not None and last[0] is mask and last[1] == of:
            return last[2]
        bias = self._columns(hidden, keys, offset)
        if mask is None:
            made = bias
            if queries > 1 and getattr(module, "is_causal", True):
                made = torch.where(_causal(queries, keys, hidden.device), bias, torch.finfo(hidden.dtype).min)
        else:
            if mask.dtype == torch.bool:
                made = torch.where(mask, bias, torch.finfo(hidden.dtype).min)
            else:
                made = mask + bias.to(mask.dtype)
        if not tracing:
            self._last = (mask, of, made)
        return made

    def beside(self, module: Any, hidden: torch.Tensor, mask: Any, cache: Any) -> torch.Tensor:
        """Numbers ``[B, heads, queries, keys]``, or more of them, beside a mask of flex attention's.

        Args:
            module: see :meth:`added`, like the others.
            hidden: there.
            mask: there; its blocks stay as they are.
            cache: there.
        """
        keys, offset = _keys(module, hidden.shape[1], mask, cache)
        queries, room = (-(-n // _FLEX_BLOCK) * _FLEX_BLOCK for n in (hidden.shape[1], keys))
        bias = self._columns(hidden, keys, offset)
        return pad(bias, (0, room - keys)).expand(-1, module.config.num_attention_heads, queries, -1)

    def _columns(self, hidden: torch.Tensor, keys: int, offset: int) -> torch.Tensor:
        """``[B, 1, 1, keys]`` in the precision of ``hidden``."""
        bias = self.bias[:, offset : offset + keys].to(hidden.device, hidden.dtype)
        bias = pad(bias, (0, keys - bias.shape[1]))
        copies = hidden.shape[0] // bias.shape[0]
        if copies * bias.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"the language model was called with {hidden.shape[0]} rows, which {bias.shape[0]} prompts "
                "can't be repeated to: their tokens' weights would be lost. Use apply(..., weigh=False)"
            )
        return bias.repeat_interleave(copies, 0)[:, None, None] if copies > 1 else bias[:, None, None]


def settle_weights(model: Any) -> None:
    """Put the hooks on that take weights if the model is patched so or a call may have some, else off.

    The hook is one plain function without a state: a copy of the model has it too, and without weights it
    does nothing.
    """
    with lock:  # of two threads the second sees what the first has done
        wanted = _wants_weights(model) or bool(_held.get(model))
        for module in attentions_of(model):
            hooks = list(module._forward_pre_hooks.items())
            numbers = [number for number, hook in hooks if hook is _take]
            if wanted and not numbers:
                module.register_forward_pre_hook(_take, with_kwargs=True)
            for number in () if wanted else numbers:
                module._forward_pre_hooks.pop(number, None)
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def _let_go(owner: weakref.ref[Any]) -> None:
    model = owner()
    if model is not None and not _wants_weights(model):
        settle_weights(model)


def _wants_weights(model: Any) -> bool:
    """Whether a model is patched so that calls may have weights."""
    controller = model.__dict__.get(ATTRIBUTE)
    return controller is not None and bool(controller.enabled and controller.settings.weigh)


def why_no_weights(model: Any) -> str | None:
    """Why a model's attention can't be told of weights, with what to do; ``None`` if it can."""
    attention = str(model.config.get_text_config()._attn_implementation)
    if attention not in _SERVED:
        return (
            f"{attention} attention takes no numbers to add to its logits: load the model with "
            'attn_implementation="sdpa"'
        )
    if attention == "flex_attention" and not _flex_takes_numbers():
        return (
            "flex_attention of this transformers takes no numbers beside its mask: load the model with "
            'attn_implementation="sdpa", or use a newer transformers'
        )
    decoder = unwrap(model.get_decoder())
    layers = [unwrap(layer) for layer in getattr(decoder, "layers", ())]
    modules = [getattr(layer, "self_attn", None) for layer in layers]
    name = type(decoder).__name__
    if not layers or any(module is None for module in modules):
        return f"not every layer of the language model, a {name}, has attention (self_attn)"
    inner = [unwrap(child) for child in model.children() if child is not decoder]
    for part in (model, *(one for one in inner if _holds(one, decoder)), decoder, *layers[:1], *modules[:1]):
        parameters = inspect.signature(type(unwrap(part)).forward).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return f"forward of its {type(part).__name__} passes no further arguments down"
    return None


def attentions_of(model: Any) -> list[torch.nn.Module]:
    """The language model's attention modules."""
    layers = getattr(unwrap(model.get_decoder()), "layers", ())
    found = (getattr(unwrap(layer), "self_attn", None) for layer in layers)
    return [unwrap(module) for module in found if module is not None]


def with_weights(arguments: Mapping[str, Any], note: CacheNote | None, hold: Hold | None) -> dict[str, Any]:
    """Arguments of a call, with the weights of what the cache will hold after it, if there are any."""
    if note is None or note.bias is None:
        return dict(arguments)
    return {**arguments, KEY: Weights(note.bias, hold)}


# ---------------------------------------------------------------------------------------- while generate runs

#: Models whose ``generate`` on pictures is under way in this thread, innermost last, and the weights of the
#: prompt.
_running: contextvars.ContextVar[tuple[tuple[Any, Weights | None], ...]] = contextvars.ContextVar(
    "ocvtp_running", default=()
)
#: What :data:`_running` held when a patched ``forward`` took the call that is under way.
_served: contextvars.ContextVar[tuple[tuple[Any, Weights | None], ...] | None] = contextvars.ContextVar(
    "ocvtp_served", default=None
)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """A patched ``forward`` is under way, which knows best whether its call has weights."""
    token = _served.set(_running.get())
    try:
        yield
    finally:
        _served.reset(token)


@contextlib.contextmanager
def weighing(owner: Any, bias: torch.Tensor | None, cache: Any, hold: Hold | None) -> Iterator[None]:
    """Calls of ``owner``'s ``forward`` that its ``generate`` makes inside have these weights, if any.

    Args:
        owner: the patched model.
        bias: ``[prompts, columns]``; ``None`` for none, whatever a ``generate`` around this one has.
        cache: that the caller passed.
        hold: of the model.
    """
    weights = None if bias is None else Weights(bias, hold)
    token = _running.set((*_running.get(), (owner, weights)))
    if cache is not None and weights is not None:
        setattr(cache, _ON_CACHE, weights)
    try:
        yield
    finally:
        _running.reset(token)
        forget_weights(cache)
        # Older generate keeps a static cache on the model. Another thread may use it by now.
        static = getattr(owner, "_cache", None)
        left = getattr(static, _ON_CACHE, None)
        if left is not None and left.is_of(hold):
            forget_weights(static)


def with_running_weights(
    controller: Controller, given: Mapping[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of a call, with weights if ``generate`` makes it and it brings kept rows along.

    Others that generate makes on caches of their own, as guidance by a second prompt does, are not about the
    prompt.

    Args:
        controller: of the model called.
        given: all arguments by name.
        kwargs: those that were given by name.
    """
    outputs, embeddings = given.get("mm_encoder_outputs"), given.get("inputs_embeds")
    cache = given.get("past_key_values")
    # Of a text, generate brings an empty dict.
    if (not outputs and embeddings is None) or KEY in kwargs or hasattr(cache, _ON_CACHE):
        return kwargs
    if torch.compiler.is_compiling() and not controller.settings.weigh:  # it can't look at the context
        return kwargs
    owner = controller.model
    weights = next((weights for model, weights in reversed(_running.get()) if model is owner), None)
    if weights is None:
        return kwargs
    # PEFT's prefix tuning puts columns into the cache. Before a chunk of a prompt, its own are there.
    shown: Any = given.get("input_ids") if embeddings is None else embeddings
    before = cached_length(cache) if shown.shape[1] >= weights.bias.shape[1] else 0
    if outputs and embeddings is not None:  # and its prompt tuning in front of the embeddings
        before += embeddings.shape[1] - weights.bias.shape[1]
    weights = weights.behind(before)
    if cache is None:
        return {**kwargs, KEY: weights}
    setattr(cache, _ON_CACHE, weights)
    return kwargs


def leave_weights(cache: Any, arguments: Mapping[str, Any]) -> None:
    """Leave the weights of a call that ``generate`` made, if there are any, on the cache that it filled."""
    if cache is not None and KEY in arguments:
        setattr(cache, _ON_CACHE, arguments[KEY])


def forget_weights(cache: Any) -> None:
    """Take what ``generate`` left off a cache."""
    if hasattr(cache, _ON_CACHE):
        delattr(cache, _ON_CACHE)


def _of_a_call_that_nobody_served(module: Any, cache: Any) -> Weights | None:
    """Weights where the patch was off when ``generate``, which had begun with it, called ``forward``.

    Whether it is on by now tells nothing: another thread may have put it on again since.
    """
    running = _running.get()
    if _served.get() is running:
        return None
    for owner, weights in reversed(running):
        if any(module is one for one in attentions_of(owner)):
            if cache is not None and weights is not None:
                setattr(cache, _ON_CACHE, weights)
            return weights
    return None


# ------------------------------------------------------------------------------------------------ in the hook


def _take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Before an attention module runs: weights off its arguments, and into its mask.

    Without keyword arguments, which PyTorch gives a hook from a moment after it is put on until a moment
    before it is off: another thread's call, which has none of ours.
    """
    if kwargs is None:
        return None
    cache = kwargs.get("past_key_values")
    kwargs = dict(kwargs)
    weights = kwargs.pop(KEY, None)
    if weights is None:
        weights = getattr(cache, _ON_CACHE, None)
    if weights is None and not torch.compiler.is_compiling() and _running.get():
        weights = _of_a_call_that_nobody_served(module, cache)
    if weights is None:
        return None
    attention = module.config._attn_implementation
    if attention not in _SERVED:
        raise ValueError(
            f"the attention implementation was changed to {attention!r} since ocvtp.apply, and it takes no "
            "weights: apply again"
        )
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    mask = kwargs.get("attention_mask")
    if mask is None or isinstance(mask, torch.Tensor):
        kwargs["attention_mask"] = weights.added(module, hidden, mask, cache)
    else:
        kwargs["position_bias"] = weights.beside(module, hidden, mask, cache)
    return args, kwargs


def _keys(module: Any, queries: int, mask: Any, cache: Any) -> tuple[int, int]:
    """How many keys the attention will see, and the column of the first."""
    layers = getattr(cache, "layers", ())
    number = module.layer_idx
    layer = layers[number] if number < len(layers) else None
    if mask is None:
        # transformers leaves a mask out for what begins the sequence, where a static cache shows all of its
        # room, and for a single query behind a growing cache; never behind a window that has begun to slide.
        if queries == 1 and layer is not None:
            return 1 + int(cache.get_seq_length(number)), 0
        return max(queries, getattr(layer, "max_cache_len", 0)), 0
    keys = int(mask.shape[-1])
    if not getattr(layer, "is_sliding", False):
        return keys, 0
    return keys, max(0, int(cache.get_seq_length(number)) + queries - keys)


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def _flex_takes_numbers() -> bool:
    """Whether flex attention takes numbers beside its mask: its own way to take them instead of one is
    incomplete, and crashes on a CPU.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    return "position_bias" in inspect.signature(flex_attention_forward).parameters


def _holds(module: Any, part: Any) -> bool:
    return any(part is child for child in module.modules())
