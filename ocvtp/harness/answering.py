"""A batch of conversations to answers, with what they cost. Knows nothing of lmms-eval."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.harness.conversations import Conversation, count_pictures, digest
from ocvtp.vlm import count_prompt_tokens
from ocvtp.vlm.encode.timing import synchronize

# What of a task's settings goes on to generate. The rest is for other models. ``until``, which lmms-eval sets
# to two newlines where a task says nothing, is left alone, as by its own classes for these models.
_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
#: What tasks say to other models, or to none.
_FOR_OTHERS = ("until", "do_sample", "image_aspect_ratio", "image_sizes", "use_cache", *_SAMPLING)


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
        output_tokens: generated, the end token among them, without padding.
        seconds: share of the batch's time in ``generate``.
        preparing: share of the batch's time in the processor, before it.
        warm: whether its batch was not the first of its process.
        asked: digest of the question, words and pictures.
        timed_on: batch size and device, without which seconds mean nothing.
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
    asked: str
    timed_on: str


class Answerer:
    """Asks a model.

    Args:
        model: on its device, in evaluation mode, patched or not.
        processor: of it, with a chat template, padding in front.
        max_new_tokens: where a task says nothing.
        timed_on: see :class:`Answer`.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, timed_on: str = "") -> None:
        self._model = model
        self._processor = processor
        self._max_new_tokens = max_new_tokens
        self._timed_on = timed_on
        self._warm = False

    @torch.no_grad()
    def answer(self, conversations: Sequence[Conversation], task: Mapping[str, Any]) -> list[Answer]:
        """One answer per conversation.

        Args:
            conversations: to be answered together.
            task: its generation settings.

        Raises:
            ValueError: pictures that the chat template leaves out.
        """
        start = time.perf_counter()
        device = self._model.device
        inputs = tokenized(self._processor, conversations).to(device, self._model.dtype)
        synchronize(device)
        began = time.perf_counter()
        output = self._model.generate(**inputs, **self.settings(task))
        synchronize(device)
        ended = time.perf_counter()
        ids = inputs["input_ids"]
        fresh = output.sequences[:, ids.shape[1] :]
        texts = self._processor.batch_decode(fresh, skip_special_tokens=True)
        counts = count_prompt_tokens(self._model, ids, output.past_key_values, inputs["attention_mask"])
        columns = (counts.read, counts.vision, counts.kept, self._written(fresh))
        read, vision, kept, written = (column.tolist() for column in columns)
        images = [count_pictures(conversation) for conversation in conversations]
        if any(pictures and not tokens for pictures, tokens in zip(images, vision, strict=True)):
            raise ValueError(
                "the model was asked about a picture or a video that the chat template left out of the prompt"
            )
        warm, self._warm = self._warm, True
        return [
            Answer(
                text=texts[row],
                images=images[row],
                input_tokens=read[row],
                vision_tokens=vision[row],
                kept_vision_tokens=kept[row],
                vision_tokens_in_layers=counts.in_layers[row],
                output_tokens=written[row],
                seconds=(ended - began) / len(conversations),
                preparing=(began - start) / len(conversations),
                warm=warm,
                asked=digest(conversation),
                timed_on=self._timed_on,
            )
            for row, conversation in enumerate(conversations)
        ]

    def _written(self, fresh: torch.Tensor) -> torch.Tensor:
        """``[B]`` tokens of ``[B, n]`` new ones, up to the first that ends an answer."""
        ends = self._model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ended = torch.isin(fresh, torch.tensor(ends, device=fresh.device, dtype=fresh.dtype))
        before = ended.long().cumsum(1) - ended.long()  # ends in front of each
        return (before == 0).sum(1)

    def settings(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate``: greedy, unless the task samples.

        What else the checkpoint's generation configuration says, such as a repetition penalty, stays.
        """
        sample = samples(task)
        names = (*_PASSED, *(_SAMPLING if sample else ()))
        given = {name: task[name] for name in names if task.get(name) is not None}
        blank = {} if sample else dict.fromkeys(_SAMPLING)
        fixed = {"do_sample": sample, "use_cache": True, "return_dict_in_generate": True}
        return {"max_new_tokens": self._max_new_tokens, **blank, **fixed, **given}


def samples(task: Mapping[str, Any]) -> bool:
    """Whether answers are drawn: a task that says ``do_sample`` means it, others by their temperature."""
    said = task.get("do_sample")
    return bool(said) if said is not None else (task.get("temperature") or 0) > 0


def ignored(task: Mapping[str, Any]) -> list[str]:
    """Generation settings that neither reach ``generate`` nor are known to be for other models."""
    return sorted(set(task) - {*_PASSED, *_FOR_OTHERS})


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
