"""A batch of conversations to answers, with what they cost. Knows nothing of lmms-eval."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.harness.conversations import Conversation, count_pictures
from ocvtp.vlm import count_prompt_tokens

# What of a task's settings goes on to generate. The rest is for other models. ``until``, which lmms-eval sets
# to two newlines where a task says nothing, is left alone, as by its own classes for these models.
_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED = ("max_new_tokens", "num_beams", "repetition_penalty")


@dataclass(frozen=True)
class Answer:
    """To one question.

    Attributes:
        text: without special tokens.
        images: pictures and videos in the prompt.
        input_tokens: of the prompt, that the language model read.
        vision_tokens: of the prompt as the processor made it.
        kept_vision_tokens: those of them that entered the language model.
        vision_tokens_in_layers: that go into one of its layers on average.
        output_tokens: generated, without padding.
        seconds: share of the batch's time in ``generate``.
        preparing: share of the batch's time in the processor, before it.
        warm: whether its batch was not the first of its process.
    """

    text: str
    images: int
    input_tokens: int
    vision_tokens: int
    kept_vision_tokens: int
    vision_tokens_in_layers: float
    output_tokens: int
    seconds: float
    preparing: float
    warm: bool


class Answerer:
    """Asks a model.

    Args:
        model: on its device, in evaluation mode, patched or not.
        processor: of it, with a chat template, padding in front.
        max_new_tokens: where a task says nothing.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self._model = model
        self._processor = processor
        self._max_new_tokens = max_new_tokens
        self._warm = False

    @torch.no_grad()
    def answer(self, conversations: Sequence[Conversation], task: Mapping[str, Any]) -> list[Answer]:
        """One answer per conversation.

        Args:
            conversations: to be answered together.
            task: its generation settings.
        """
        start = time.perf_counter()
        device = self._model.device
        inputs = tokenized(self._processor, conversations).to(device, self._model.dtype)
        _synchronize(device)
        began = time.perf_counter()
        output = self._model.generate(**inputs, **self.settings(task))
        _synchronize(device)
        ended = time.perf_counter()
        ids = inputs["input_ids"]
        fresh = output.sequences[:, ids.shape[1] :]
        texts = self._processor.batch_decode(fresh, skip_special_tokens=True)
        counts = count_prompt_tokens(self._model, ids, output.past_key_values, inputs["attention_mask"])
        pad = self._processor.tokenizer.pad_token_id
        new = (fresh != pad).sum(1) if pad is not None else torch.full((len(fresh),), fresh.shape[1])
        columns = (counts.read, counts.vision, counts.kept, new)
        read, vision, kept, written = (column.tolist() for column in columns)
        warm, self._warm = self._warm, True
        return [
            Answer(
                text=texts[row],
                images=count_pictures(conversation),
                input_tokens=read[row],
                vision_tokens=vision[row],
                kept_vision_tokens=kept[row],
                vision_tokens_in_layers=counts.in_layers[row],
                output_tokens=written[row],
                seconds=(ended - began) / len(conversations),
                preparing=(began - start) / len(conversations),
                warm=warm,
            )
            for row, conversation in enumerate(conversations)
        ]

    def settings(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate``: greedy, whatever the checkpoint prefers, unless the task samples."""
        sample = bool(task.get("do_sample")) or (task.get("temperature") or 0) > 0
        names = (*_PASSED, *(_SAMPLING if sample else ()))
        given = {name: task[name] for name in names if task.get(name) is not None}
        blank = {} if sample else dict.fromkeys(_SAMPLING)
        fixed = {"do_sample": sample, "use_cache": True, "return_dict_in_generate": True}
        return {"max_new_tokens": self._max_new_tokens, **blank, **fixed, **given}


def tokenized(processor: Any, conversations: Sequence[Conversation]) -> Any:
    """What the model takes: a batch of conversations, each with room for an answer."""
    known = inspect.signature(processor.apply_chat_template).parameters
    padding: dict[str, Any] = {"padding": True}  # where it goes depends on the version of transformers
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"processor_kwargs": padding} if "processor_kwargs" in known else padding),
    )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
