"""What the language model gets of a selection: the kept tokens alone, or tokens that stand for all others."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.accuracy.testset import TestSet
from ocvtp_kernels.merge import merge_by, nearest_kept
from ocvtp_kernels.selection import gather_tokens

#: Of the product's options ``merge`` and ``weigh``: neither, one, the other, both, and both with the mean
#: taken before the projector.
Mode = Literal["plain", "merged", "weighted", "both", "before"]


@dataclass(frozen=True)
class Options:
    """Of :func:`ocvtp.apply`."""

    merge: Literal["off", "projected", "features"]
    weigh: bool


PLAIN: Mode = "plain"
BOTH: Mode = "both"
BEFORE: Mode = "before"
MODES: dict[Mode, Options] = {
    PLAIN: Options("off", False),
    "merged": Options("projected", False),
    "weighted": Options("off", True),
    BOTH: Options("projected", True),
    BEFORE: Options("features", True),
}


class Standing:
    """Kept tokens, and whom they stand for.

    A token belongs to the nearest kept one by what the language model reads: by projected rows, or by the
    projector's inputs where the mean is taken of those.

    Args:
        model: of the test bed.
        test: pictures.
        kept: ``[P, keep]`` indices, ascending.
    """

    def __init__(self, model: Any, test: TestSet, kept: torch.Tensor) -> None:
        self._model, self._test, self._kept = model, test, kept

    @torch.no_grad()
    def seen(self, mode: Mode) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows ``[P, keep, D]`` for the language model, and what is added to their attention logits."""
        options, test, keep = MODES[mode], self._test, self._kept.shape[1]
        if options.merge == "features":
            owner, mass = nearest_kept(test.tokens, self._kept)
            return self._model.model.multi_modal_projector(merge_by(test.tokens, owner, keep)), mass.log()
        merged = options.merge == "projected"
        rows = self._means if merged else gather_tokens(test.projected, self._kept)
        return rows, self._owners[1].log() if options.weigh else None

    @functools.cached_property
    def _owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        return nearest_kept(self._test.projected, self._kept)

    @functools.cached_property
    def _means(self) -> torch.Tensor:
        return merge_by(self._test.projected, self._owners[0], self._kept.shape[1])
