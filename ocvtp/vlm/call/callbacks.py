"""User callbacks of ``generate`` see the long prompt, as they would without pruning.

Stopping criteria, logits processors, ``prefix_allowed_tokens_fn`` and streamers often slice by the length of
the prompt the user has in hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.call.prompt import restore_prompt

# Attributes of transformers' own criteria and processors that count prompt tokens.
_PROMPT_LENGTHS = ("max_length", "min_length", "prompt_length_to_skip", "prompt_ignore_length")


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
        return self._builtin(criterion) or _Criterion(criterion, self)

    def processor(self, processor: Any) -> Any:
        """A logits processor in the long view."""
        return self._builtin(processor) or _Processor(processor, self)

    def prefix_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A ``prefix_allowed_tokens_fn(batch_id, input_ids [length])`` in the long view."""

        def allowed(batch_id: int, input_ids: torch.Tensor) -> Any:
            row = self.prompt[batch_id].to(input_ids.device)
            return function(batch_id, torch.cat([row, input_ids[self.short :]]))

        return allowed

    def streamer(self, streamer: Any) -> Any:
        """A streamer whose first ``put`` gets the long prompt."""
        return _Streamer(streamer, self)

    def _builtin(self, item: Any) -> Any:
        """transformers' own classes keep their type: by it, they replace generate's defaults."""
        if not type(item).__module__.startswith("transformers."):
            return None
        shifted = copy.copy(item)
        for name in _PROMPT_LENGTHS:
            value = getattr(item, name, None)
            if isinstance(value, int):
                setattr(shifted, name, max(0, value - self.dropped))
        return shifted


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
    # LogitsProcessorList counts the parameters and demands extra arguments for more than these two.
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
