"""Before any figure: the product, as a user calls it, gives the answers that are counted here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

import ocvtp
from bench.accuracy.selectors import Selector
from bench.accuracy.testset import TestSet
from bench.testbed.language import prompt
from bench.testbed.network import answer, said
from ocvtp_kernels.selection import gather_tokens


class GateError(RuntimeError):
    """The harness and the product disagree."""


@torch.no_grad()
def check(
    model: Any, processor: Any, test: TestSet, cases: Sequence[tuple[Selector, Any, dict[str, Any], int]]
) -> int:
    """Compare words for the pictures of ``test``; how many were compared.

    Args:
        model: of the test bed.
        processor: of it.
        test: a few pictures.
        cases: a selector, what :func:`ocvtp.apply` takes for it (pruner or rule, and options), and a budget.

    Raises:
        GateError: a word differs.
    """
    compared = 0
    for selector, pruner, options, keep in cases:
        kept = selector.choose(test, keep, 0)
        picture = model.model.multi_modal_projector(gather_tokens(test.tokens, kept))
        batch = test.batch(0, len(test)).to(picture.device)
        counted = said(answer(model, picture, batch), batch).tolist()
        with ocvtp.pruned(model, pruner, keep=keep, **options):
            generated = [word for one in test.examples for word in _say(model, processor, one)]
        if counted != generated:
            wrong = sum(a != b for a, b in zip(counted, generated, strict=True))
            raise GateError(
                f"{selector.name} at {keep}: {wrong} of {len(generated)} answers differ between the product "
                "and this benchmark"
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
