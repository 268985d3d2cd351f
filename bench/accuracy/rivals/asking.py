"""Right answers of the patched model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

import ocvtp
from bench.accuracy.answers import correct
from bench.accuracy.gate import GateError
from bench.accuracy.rivals.contenders import Contender
from bench.accuracy.testset import TestSet
from bench.testbed.language import prompt
from bench.testbed.network import answer, said
from bench.testbed.packing import normalise
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.encode.encode import encode

_PICTURES, _QUESTIONS = 25, 40  # at once


@torch.no_grad()
def right_answers(model: Any, processor: Any, test: TestSet, contender: Contender, keep: int) -> np.ndarray:
    """``[seeds, Q]``: which questions are answered right.

    What is kept of a picture is asked for once where the question doesn't matter, and all its questions are
    answered in one packed sequence, as :mod:`bench.accuracy` does; else each question is a prompt.
    """
    if contender.pruner is None:
        return correct(model, test)[None]
    found = []
    for seed in range(contender.seeds):
        options = {**contender.options, **({"seed": seed} if contender.seeds > 1 else {})}
        with ocvtp.pruned(model, contender.pruner, keep=keep, **options):
            if contender.asks:
                found.append(_one_by_one(model, processor, test))
                continue
            rows, bias = seen(model, test)
        found.append(correct(model, test, rows, bias))
    return np.stack(found)


def seen(model: Any, test: TestSet) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a patched model's language model gets of every picture: rows ``[P, n, D]``, and what is added to
    their attention logits ``[P, n]``."""
    controller = controller_of(model)
    rows, bias = [], []
    for start in range(0, len(test), _PICTURES):
        some = test.examples[start : start + _PICTURES]
        pixels = normalise([one.pixels for one in some], test.size.side).to(model.device, model.dtype)
        kept = encode(controller.adapter, {"pixel_values": pixels}, controller.settings, None)["image"]
        rows.append(torch.stack(list(kept.rows)))
        if kept.mass is not None:
            bias.append(kept.mass.log().reshape(len(some), -1))
    return torch.cat(rows), torch.cat(bias) if bias else None


def _one_by_one(model: Any, processor: Any, test: TestSet) -> np.ndarray:
    """``[Q]`` bool, question by question through ``forward``."""
    asked = [(one, question) for one in test.examples for question in one.questions]
    found = []
    for start in range(0, len(asked), _QUESTIONS):
        some = asked[start : start + _QUESTIONS]
        inputs = _inputs(processor, [(one.pixels, question.text) for one, question in some]).to(model.device)
        words = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        truths = [test.vocabulary[question.answer] for _, question in some]
        found += [word == truth for word, truth in zip(words, truths, strict=True)]
    return np.array(found)


def _inputs(processor: Any, asked: list[tuple[np.ndarray, str]]) -> Any:
    images = [Image.fromarray(pixels) for pixels, _ in asked]
    texts = [prompt(text) for _, text in asked]
    return processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")


@torch.no_grad()
def check(model: Any, processor: Any, few: TestSet, contender: Contender, keep: int) -> int:
    """Compare words of this harness with those of ``generate``; how many were compared.

    Raises:
        GateError: a word differs.
    """
    if contender.pruner is None:
        return 0
    with ocvtp.pruned(model, contender.pruner, keep=keep, **contender.options):
        asked = [(one.pixels, question.text) for one in few.examples for question in one.questions]
        inputs = _inputs(processor, asked).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1].tolist()
        if contender.asks:
            counted = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        else:
            rows, bias = seen(model, few)
            counted = []
    if not contender.asks:
        batch = few.batch(0, len(few)).to(rows.device)
        counted = said(answer(model, rows, batch, bias), batch).tolist()
    if counted != generated:
        wrong = sum(a != b for a, b in zip(counted, generated, strict=True))
        raise GateError(
            f"{contender.name} at {keep}: {wrong} of {len(generated)} answers differ from generate's"
        )
    return len(generated)
