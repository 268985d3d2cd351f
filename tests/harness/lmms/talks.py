"""Conversations about pictures, answered by the plug-in and by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from lmms_eval.api.instance import Instance
from PIL import Image

import ocvtp
from tests.harness.lmms.asking import ocvtp_model

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
#: Heights and widths of the pictures of each question.
QUESTIONS: dict[str, list[tuple[int, int]]] = {
    "what is this?": [(80, 120)],
    "what is a picture?": [],
    "what is written on the left of it, and in which colour?": [(64, 200)],
    "and here?": [(200, 60)],
    "are these the same?": [(112, 112), (90, 70)],
}
Talk = list[dict[str, Any]]
#: Generated tokens of each conversation, without padding.
Said = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A family's folder, and what is asked.

    Attributes:
        folder: of the checkpoint.
        template: file of a chat template, if the processor needs one.
        talks: conversations in transformers' form.
    """

    folder: Path
    template: Path | None
    talks: list[Talk]

    def model_args(self, pruner: str) -> str:
        """For the plug-in."""
        given = "" if self.template is None else f",chat_template={self.template}"
        return f"pretrained={self.folder},{pruner}{given}"

    def pictures(self) -> list[int]:
        """In each conversation."""
        return [sum(part["type"] == "image" for part in talk[0]["content"]) for talk in self.talks]


def talk(text: str, sizes: Sequence[tuple[int, int]]) -> Talk:
    """A question about pictures of noise."""
    pictures = [
        Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in sizes
    ]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def requests(lm: Any, talks: list[Talk]) -> list[Instance]:
    """As lmms-eval asks a chat model."""
    lm.task_dict["talks"] = {"test": talks}
    return [
        Instance(
            request_type="generate_until",
            arguments=(f"question {number}", in_their_form, dict(GREEDY), number, "talks", "test"),
            idx=0,
            metadata={"task": "talks", "doc_id": number, "repeats": 1},
        )
        for number in range(len(talks))
    ]


def in_their_form(said: Talk) -> Talk:
    """As tasks give messages to models."""
    return [{**message, "content": [_part(part) for part in message["content"]]} for message in said]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "url": part["image"]} if part["type"] == "image" else part


def answers(case: Case, pruner: str, batch_size: int) -> tuple[Said, list[dict[str, Any]]]:
    """Tokens without padding, and counts, of the plug-in."""
    lm = ocvtp_model(case.model_args(pruner), batch_size)
    found = lm.generate_until(requests(lm, case.talks))
    pad = transformers.AutoTokenizer.from_pretrained(case.folder).pad_token_id
    tokens = [[int(token) for token in each.text.split()] for each in found]
    counts = [each.token_counts.to_dict() for each in found]
    return [[token for token in row if token != pad] for row in tokens], counts


@torch.no_grad()
def by_transformers(case: Case, **pruned: Any) -> tuple[Said, list[int]]:
    """Tokens that ``generate`` adds to each prompt alone, and how many of it the language model reads."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    if case.template is not None:
        processor.chat_template = case.template.read_text(encoding="utf-8")
    if pruned:
        ocvtp.apply(model, **pruned)
    pad = processor.tokenizer.pad_token_id
    tokens, read = [], []
    for each in case.talks:
        inputs = processor.apply_chat_template(
            each, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs = {key: value for key, value in inputs.items() if key != "labels"}  # PaliGemma's adds them
        read.append(model(**inputs).logits.shape[1])
        new = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        tokens.append([token for token in new.tolist() if token != pad])
    return tokens, read
