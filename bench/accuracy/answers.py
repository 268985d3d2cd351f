"""The model's answers, given which tokens it gets to see."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.accuracy.testset import TestSet
from bench.testbed.network import answer
from ocvtp_kernels.selection import gather_tokens

_BATCH = 25


@torch.no_grad()
def correct(model: Any, test: TestSet, kept: torch.Tensor | None, shift: int = 0) -> np.ndarray:
    """``[Q]`` bool: whether the model's most likely next word is the answer.

    Positions are compact, as after ``ocvtp.apply``; all questions of a picture are answered in one packed
    sequence (:mod:`bench.testbed.packing`). :mod:`bench.accuracy.gate` holds this against ``generate``.

    Args:
        model: of the test bed.
        test: pictures and questions.
        kept: ``[P, keep]`` indices, ascending; ``None`` for all tokens.
        shift: the tokens are those of another picture, so many before: it answers about that one.
    """
    results = []
    tokens = test.tokens if kept is None else gather_tokens(test.tokens, kept)
    tokens = tokens.roll(shift, 0)
    for start in range(0, len(test), _BATCH):
        batch = test.batch(start, min(start + _BATCH, len(test))).to(tokens.device)
        picture = model.model.multi_modal_projector(tokens[start : start + _BATCH])
        logits = answer(model, picture, batch)
        row, column = batch.answers.T
        results.append(logits[row, column].argmax(-1) == batch.targets[row, column])
    return torch.cat(results).cpu().numpy()


@torch.no_grad()
def correct_blind(model: Any, test: TestSet) -> np.ndarray:
    """The same for a model that was trained without pictures and gets none."""
    results = []
    for start in range(0, len(test), _BATCH):
        batch = test.batch(start, min(start + _BATCH, len(test))).to(model.device)
        logits = answer(model, None, batch)
        row, column = batch.answers.T
        results.append(logits[row, column].argmax(-1) == batch.targets[row, column])
    return torch.cat(results).cpu().numpy()
