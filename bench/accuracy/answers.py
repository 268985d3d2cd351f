"""The model's answers, given which tokens it gets to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.accuracy.testset import TestSet
from bench.testbed.network import answer, right
from ocvtp_kernels.selection import gather_tokens


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
    tokens = test.tokens if kept is None else gather_tokens(test.tokens, kept)
    parts = tokens.roll(shift, 0).split([len(batch.ids) for batch in test.batches])
    return _correct(model, test, [model.model.multi_modal_projector(part) for part in parts])


@torch.no_grad()
def correct_blind(model: Any, test: TestSet) -> np.ndarray:
    """The same for a model that was trained without pictures and gets none."""
    return _correct(model, test, [None] * len(test.batches))


def _correct(model: Any, test: TestSet, pictures: Sequence[torch.Tensor | None]) -> np.ndarray:
    each = [
        right(answer(model, picture, batch), batch)
        for batch, picture in zip(test.batches, pictures, strict=True)
    ]
    return torch.cat(each).cpu().numpy()
