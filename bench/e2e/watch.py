"""Clocks on the parts of a model, and on its answers token by token."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

#: Stage -> milliseconds.
Stages = dict[str, float]
LANGUAGE_MODEL = "language model"
_MODULES = {
    "vision tower": ("vision_tower", "visual"),
    "projector": ("multi_modal_projector",),
    LANGUAGE_MODEL: ("language_model",),
}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Watch:
    """What was seen of a model's first run in a block.

    Attributes:
        stages: milliseconds of each part. Qwen's merger is part of its tower; a tower that somebody runs
            layer by layer goes unseen.
        prompt_tokens: that the language model read of each prompt; 0 if it did not run.
    """

    stages: Stages = field(default_factory=dict)
    prompt_tokens: int = 0


@contextlib.contextmanager
def watched(model: Any) -> Iterator[Watch]:
    """Time a model's parts, of each its first call alone. The device is synchronised around each of them."""
    watch, started = Watch(), {}
    handles = []
    device = next(model.parameters()).device

    def begin(name: str, arguments: dict[str, Any]) -> None:
        synchronize(device)
        started[name] = time.perf_counter()
        if name == LANGUAGE_MODEL and not watch.prompt_tokens:
            watch.prompt_tokens = arguments["inputs_embeds"].shape[1]

    def end(name: str) -> None:
        synchronize(device)
        watch.stages.setdefault(name, (time.perf_counter() - started[name]) * 1e3)

    for name, attributes in _MODULES.items():
        for attribute in attributes:
            module = getattr(model.model, attribute, None)
            if module is not None:
                before = functools.partial(_call, begin, name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(lambda *_, name=name: end(name)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _call(begin: Any, name: str, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    begin(name, kwargs)


class TokenClock(StoppingCriteria):
    """Notes when each new token is there, as ``generate`` asks whether to stop; never says so.

    Attributes:
        seconds: since :meth:`start`, one for each new token.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        self.start()

    def start(self) -> None:
        """Begin anew."""
        synchronize(self._device)
        self.seconds, self._begun = [], time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """See :class:`transformers.StoppingCriteria`."""
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._begun)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
