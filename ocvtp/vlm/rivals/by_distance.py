"""Methods that choose by distance alone: DivPrune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ocvtp.methods import divprune
from ocvtp.selection import Selection
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.reducer import EVERYWHERE, Reducer


@dataclass(frozen=True, eq=False)
class DivPrune(Reducer):
    """Tokens far from each other, by the cosine of what the language model reads (arXiv 2503.02175)."""

    name = "divprune"
    title = "DivPrune"
    source = "arXiv 2503.02175"
    families = MappingProxyType(
        {
            **EVERYWHERE,
            "llava_next": "a pool of all tiles' tokens, where the published one has no padding, but newlines",
        }
    )
    classless = ""
    pooled = True

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Selection:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        projected = evidence.projected()
        return divprune(projected.unflatten(0, (-1, evidence.tiles)).flatten(1, 2), keep)
