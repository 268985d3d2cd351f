"""The model's answers, given what it gets to see of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.accuracy.testset import TestSet
from bench.testbed.network import answer, right

_Parts = Sequence[torch.Tensor | None]


@torch.no_grad()
def correct(
    model: Any, test: TestSet, rows: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> np.ndarray:
    """``[Q]`` bool: whether the model's most likely next word is the answer.

    Positions are compact, as after ``ocvtp.apply``; all questions of a picture are answered in one packed
    sequence (:mod:`bench.testbed.packing`). :mod:`bench.accuracy.gate` holds this against ``generate``.

    Args:
        model: of the test bed.
        test: pictures and questions.
        rows: ``[P, n, D]`` picture tokens, projected (:mod:`bench.accuracy.standing`); ``None`` for all.
        bias: ``[P, n]``, added to their attention logits.
    """
    sizes = [len(batch.ids) for batch in test.batches]
    parts = (test.projected if rows is None else rows).split(sizes)
    return _correct(model, test, parts, [None] * len(sizes) if bias is None else bias.split(sizes))


@torch.no_grad()
def correct_blind(model: Any, test: TestSet) -> np.ndarray:
    """The same for a model that was trained without pictures and gets none."""
    nothing = [None] * len(test.batches)
    return _correct(model, test, nothing, nothing)


def _correct(model: Any, test: TestSet, pictures: _Parts, biases: _Parts) -> np.ndarray:
    each = [
        right(answer(model, picture, batch, bias), batch)
        for batch, picture, bias in zip(test.batches, pictures, biases, strict=True)
    ]
    return torch.cat(each).cpu().numpy()
