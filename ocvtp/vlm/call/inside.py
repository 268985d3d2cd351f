"""What calls tell the hooks inside the language model, and which of them can't be served there."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ocvtp.vlm.call.controller import Controller
from ocvtp.vlm.call.generation import effective
from ocvtp.vlm.in_llm import hooks_of


@contextlib.contextmanager
def inside(controller: Controller, ids: Any, *, generating: bool, placed: bool = True) -> Iterator[None]:
    """While a call on a prompt is made: how long that is, and where its vision tokens are.

    Args:
        controller: of the patched model.
        ids: ``[B, S]`` of the prompt as the model will see it, if there are any.
        generating: ``generate`` rather than ``forward``, which the former calls and knows less.
        placed: whether it will see these ids, too, and not only embeddings.
    """
    hooks = hooks_of(controller.model)
    # Also those that ocvtp.vlm.in_llm.install put on.
    if hooks is None or torch.compiler.is_compiling() or (hooks.told and not generating):
        yield
        return
    vision = None
    known = isinstance(ids, torch.Tensor) and ids.ndim == 2
    if known and not placed:
        vision = torch.zeros_like(ids, dtype=torch.bool)
        for modality in controller.adapter.pixel_keys:
            vision = vision | (ids == controller.adapter.token_id(modality))
    with hooks.expecting(ids.shape[1] if known else None, vision):
        yield


def under_way(controller: Controller) -> bool:
    """Whether a call that came through the patched methods is, in this thread; compiled ones aren't asked."""
    hooks = hooks_of(controller.model)
    return torch.compiler.is_compiling() or (hooks is not None and hooks.told)


def check_forward(controller: Controller, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a call of ``forward`` with pixels that can't be served."""
    if controller.settings.inside is not None and arguments.get("labels") is not None:
        raise ValueError(
            "labels are of the long prompt, and tokens that are dropped inside the language model have no "
            "logits: compute the loss yourself, or apply(..., inside=None)"
        )


def check_generate(controller: Controller, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a call of ``generate`` with pixels that can't be served."""
    if controller.settings.inside is None:
        return
    if effective(controller.model, arguments, "cache_implementation") == "paged":
        raise ValueError(
            "a paged cache holds as many tokens in every layer, and what is dropped in the language model "
            "is in some alone"
        )
    if effective(controller.model, arguments, "prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size: tokens are dropped inside the language model by the whole prompt, so it "
            "can't be read in chunks"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        value = (
            arguments.get(name) if name == "assistant_model" else effective(controller.model, arguments, name)
        )
        if value is not None and not _crops_by_tokens():
            raise ValueError(
                f"{name} with tokens dropped inside the language model needs a newer transformers: this one "
                "crops every layer of a cache to one length"
            )


def _crops_by_tokens() -> bool:
    """Whether caches are cropped by how many tokens go, which layers of any length can follow."""
    from transformers.cache_utils import DynamicLayer

    return "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
