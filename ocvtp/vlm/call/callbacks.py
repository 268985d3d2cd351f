"""Callbacks of ``generate`` see the long prompt, as they would without pruning.

Stopping criteria, logits processors, ``prefix_allowed_tokens_fn`` and streamers often slice by the length of
the prompt the user has in hand, whoever wrote them: transformers' own are built from it as well.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.call.prompt import restore_prompt

# Where transformers replaces the processors and criteria it made by the caller's of the same type.
_MERGE = "_merge_criteria_processor_list"
_lock = threading.Lock()


@dataclass(frozen=True)
class LongView:
    """The long prompt in front of whatever follows the short one.

    Attributes:
        prompt: ``[B, long]`` token ids.
        short: length of the short prompt.
    """

    prompt: torch.Tensor
    short: int

    @property
    def dropped(self) -> int:
        """Columns the prompt lost; negative if padding made it longer."""
        return self.prompt.shape[1] - self.short

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[B * n, short + new] -> [B * n, long + new]``."""
        return restore_prompt(input_ids, self.prompt, self.short)

    def criterion(self, criterion: Any) -> Any:
        """A stopping criterion in the long view."""
        return _instance(criterion, self) or _Criterion(criterion, self)

    def processor(self, processor: Any) -> Any:
        """A logits processor in the long view."""
        return _instance(processor, self) or _Processor(processor, self)

    def prefix_function(self, function: Callable[..., Any], copies: int) -> Callable[..., Any]:
        """A ``prefix_allowed_tokens_fn(batch_id, input_ids [length])`` in the long view.

        Args:
            function: the caller's.
            copies: how often ``generate`` repeats a prompt, beams aside.
        """

        def allowed(batch_id: int, input_ids: torch.Tensor) -> Any:
            row = self.prompt[batch_id // copies].to(input_ids.device)
            return function(batch_id, torch.cat([row, input_ids[self.short :]]))

        return allowed

    def streamer(self, streamer: Any) -> Any:
        """A streamer whose first ``put`` gets the long prompt."""
        return _Streamer(streamer, self)


@contextlib.contextmanager
def compared_by_own_type(model: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let ``generate`` compare what is in the long view by the type its user gave it.

    transformers compares types, not classes, to replace what it would have made itself. For the length of the
    block, on this instance alone, the comparison sees the caller's own objects.

    Args:
        model: whose ``generate`` is to run.
        arguments: of the call.
    """
    given = [*(arguments.get("logits_processor") or ()), *(arguments.get("stopping_criteria") or ())]
    if not any(_own(item) is not item for item in given):
        yield
        return
    with _lock:  # calls in other threads share it
        merge = model.__dict__.get(_MERGE)
        if not isinstance(merge, _Merge):
            merge = model.__dict__[_MERGE] = _Merge(getattr(model, _MERGE), merge)
        merge.users += 1
    try:
        yield
    finally:
        with _lock:
            merge.users -= 1
            if not merge.users and model.__dict__.get(_MERGE) is merge:
                del model.__dict__[_MERGE]
                if merge.before is not None:
                    model.__dict__[_MERGE] = merge.before


class _Merge:
    """In the place of the method that merges two lists."""

    def __init__(self, original: Callable[..., Any], before: Any) -> None:
        self.original = original
        self.before = before  # what was on the instance
        self.users = 0

    def __call__(self, default_list: Any, custom_list: Any) -> Any:
        merged = self.original(default_list, [_own(item) for item in custom_list])
        shown = {id(_own(item)): item for item in custom_list}
        return type(merged)(shown.get(id(item), item) for item in merged)


class _Shown:
    """What instances of :func:`_shown_class` have of their own: the rest is the object they stand for."""

    __slots__ = ("_ocvtp_item", "_ocvtp_view")

    _ocvtp_item: Any
    _ocvtp_view: LongView


def _own(item: Any) -> Any:
    """The caller's own object behind one in the long view."""
    return item._ocvtp_item if isinstance(item, _Shown) else item


def _instance(item: Any, view: LongView) -> Any:
    """An instance of the item's class that calls the item with long ids; ``None`` where there can't be one.

    transformers asks for classes: one of its processors is kept from assistants.
    """
    from transformers import LogitsProcessor, StoppingCriteria

    if not isinstance(item, (LogitsProcessor, StoppingCriteria)):
        return None
    try:
        cls: Any = type(item)
        shown = object.__new__(_shown_class(cls))
        object.__setattr__(shown, "__dict__", item.__dict__)
    except (AttributeError, TypeError):  # a class that can't be derived from, or without attributes
        return None
    object.__setattr__(shown, "_ocvtp_item", item)
    object.__setattr__(shown, "_ocvtp_view", view)
    return shown


@functools.lru_cache(maxsize=64)
def _shown_class(cls: Any) -> Any:
    from transformers import MaxLengthCriteria

    # LogitsProcessorList counts the parameters, and demands more arguments where there are more.
    @functools.wraps(cls.__call__)
    def call(self: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._ocvtp_item(self._ocvtp_view(input_ids), scores, **kwargs)

    body: dict[str, Any] = {"__slots__": (), "__call__": call}
    if issubclass(cls, MaxLengthCriteria):  # StoppingCriteriaList tells generate, which counts the short ids
        body["max_length"] = property(lambda self: self._ocvtp_item.max_length - self._ocvtp_view.dropped)
    return types.new_class(cls.__name__, (_Shown, cls), exec_body=lambda namespace: namespace.update(body))


class _Wrapper:
    def __init__(self, wrapped: Any, view: LongView) -> None:
        self._wrapped = wrapped
        self._view = view

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_wrapped", "_view"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)  # generate looks for eos_token_id and the like


class _Criterion(_Wrapper):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._wrapped(self._view(input_ids), scores, **kwargs)


class _Processor(_Wrapper):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._wrapped(self._view(input_ids), scores)


class _Streamer(_Wrapper):
    _prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            value = self._view(value)
        self._wrapped.put(value)

    def end(self) -> None:
        self._wrapped.end()
