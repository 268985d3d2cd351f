"""The question in a prompt, for methods that read it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.vlm.call.documents import documents_of, text_positions
from ocvtp.vlm.call.frame import Frame
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.encode.questions import Asking, questions_of


def asking_of(
    adapter: Adapter, settings: Settings, frame: Frame, arguments: Mapping[str, Any], *, worded: bool
) -> Asking | None:
    """What tells the questions of a call; ``None`` where nobody reads the prompt.

    Args:
        adapter: of the model.
        settings: of the call.
        frame: of the call.
        arguments: of the call. What its labels teach is no question.
        worded: whether ids are those of words: behind embeddings nobody knows them.

    Raises:
        ValueError: a call whose question can't be told.
    """
    method = settings.selector
    if not isinstance(method, Reducer) or not method.reads_prompt:
        return None
    if not worded:
        raise ValueError(f"{method.title} reads the question: pass input_ids, not inputs_embeds alone")
    if torch.compiler.is_compiling():
        raise ValueError(f"{method.title} reads the question, on the host: it can't be compiled")
    text = text_positions(adapter, frame, arguments.get("position_ids"))
    if documents_of(adapter, frame, text, arguments) is not None:
        raise ValueError(
            f"{method.title} reads the question about a picture, and position_ids say that a row holds "
            "several documents: pass them as rows of their own"
        )
    said = torch.ones_like(frame.ids, dtype=torch.bool) if frame.mask is None else frame.mask.bool()
    for modality in adapter.pixel_keys:
        said = said & (frame.ids != adapter.token_id(modality))
    labels = arguments.get("labels")
    if isinstance(labels, torch.Tensor) and labels.shape[-1] >= frame.ids.shape[1]:
        asked = said & (labels[:, -frame.ids.shape[1] :].to(said.device) == -100)
        said = torch.where(asked.any(1, keepdim=True), asked, said)  # who learns every word knows no question
    return functools.partial(questions_of, frame.ids, said)
