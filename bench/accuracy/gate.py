"""Before any figure: the product, as a user calls it, gives the answers that are counted here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

import ocvtp
from bench.accuracy.cases import Case
from bench.accuracy.standing import MODES, Standing
from bench.accuracy.testset import TestSet
from bench.testbed.language import prompt
from bench.testbed.network import answer, said


class GateError(RuntimeError):
    """The harness and the product disagree."""


@torch.no_grad()
def check(model: Any, processor: Any, test: TestSet, cases: Sequence[Case]) -> int:
    """Compare words for the pictures of ``test``; how many were compared.

    Args:
        model: of the test bed.
        processor: of it.
        test: a few pictures.
        cases: to compare.

    Raises:
        GateError: a word differs.
    """
    compared = 0
    for case in cases:
        rows, bias = Standing(model, test, case.selector.choose(test, case.keep, 0)).seen(case.mode)
        batch = test.batch(0, len(test)).to(rows.device)
        counted = said(answer(model, rows, batch, bias), batch).tolist()
        options: dict[str, Any] = {**asdict(MODES[case.mode]), **case.options}
        with ocvtp.pruned(model, case.pruner, keep=case.keep, **options):
            generated = [word for one in test.examples for word in _say(model, processor, one)]
        if counted != generated:
            wrong = sum(a != b for a, b in zip(counted, generated, strict=True))
            raise GateError(
                f"{case.selector.name} at {case.keep}, {case.mode}: {wrong} of {len(generated)} answers "
                "differ between the product and this benchmark"
            )
        compared += len(generated)
    return compared


def _say(model: Any, processor: Any, one: Any) -> list[int]:
    """The first new token for every question about a picture, by ``generate``."""
    image = Image.fromarray(one.pixels)
    texts = [prompt(question.text) for question in one.questions]
    inputs = processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return output[:, -1].tolist()
