"""Where pruning does not help, or little: measured like everything else."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.e2e.methods import OURS, UNPRUNED
from bench.e2e.presets import build
from bench.e2e.prompts import prompt
from bench.scaling.points import timed, unpruned_and_ours
from bench.scaling.sizes import Scale
from bench.scaling.sweeps import check_model


@dataclass(frozen=True)
class Limit:
    """A setting.

    Attributes:
        what: it is, for the table.
        side: of the picture, in pixels.
        keep: tokens of it.
        text_tokens: of the prompt.
        answer_tokens: generated.
        layers: of the language model; ``None`` for all.
    """

    what: str
    side: int = 336
    keep: int = 64
    text_tokens: int = 32
    answer_tokens: int = 1
    layers: int | None = None


LIMITS = (
    Limit("576 image tokens, one token answered"),
    Limit("36 image tokens", side=84, keep=16),
    Limit("144 image tokens", side=168, keep=64),
    Limit("an answer of 64 tokens", answer_tokens=64),
    Limit("1024 text tokens beside the image", text_tokens=1024),
    Limit("a language model of one layer", layers=1),
)


def limits(scale: Scale, device: torch.device, done: Any) -> Iterator[dict[str, Any]]:
    """Every setting unpruned and pruned, in turns; a row for each."""
    for limit in LIMITS:
        if done(limit.what):
            continue
        sizes: dict[str, int] = {} if limit.layers is None else {"layers": limit.layers}
        model, pruner = build(scale.llava(side=limit.side, **sizes), device)
        inputs = prompt(model, image=(limit.side, limit.side), text_tokens=limit.text_tokens)
        check_model(model, pruner, limit.keep, inputs)
        how = {"max_new_tokens": limit.answer_tokens, "do_sample": False}
        call = functools.partial(model.generate, **inputs, **how)
        times = timed(unpruned_and_ours(model, pruner, limit.keep, call), device, scale.seconds)
        before, after = times[UNPRUNED], times[OURS]
        yield {
            "what": limit.what,
            "image_tokens": (limit.side // 14) ** 2,
            "keep": limit.keep,
            "text_tokens": limit.text_tokens,
            "answer_tokens": limit.answer_tokens,
            "layers": model.config.get_text_config().num_hidden_layers,
            "unpruned_ms": before.to_dict(),
            "pruned_ms": after.to_dict(),
            "speedup": before.median / after.median,
        }
