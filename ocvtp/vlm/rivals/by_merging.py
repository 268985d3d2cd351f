"""Methods that merge what they don't keep: VisionZip, PruMerge, PruMerge+, ToMe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ocvtp.methods import prumerge, tome_post, visionzip, visionzip_merged, visionzip_tiles
from ocvtp.methods.tome import even_schedule, first_places
from ocvtp.selection import Reduction
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.reducer import EVERYWHERE, Reducer, Site, adapted
from ocvtp.vlm.rivals.by_attention import RECEIVED, Salient
from ocvtp_kernels._checks import require_count


@dataclass(frozen=True, eq=False)
class VisionZip(Salient):
    """Tokens the class token attends to, and means of groups of the others (arXiv 2412.04467).

    Attributes:
        contextual: rows that are means; the class token is one of the others. Default: 10 of 64, as in all
            published settings; for Qwen2.5-VL 5 % of the image's tokens.
    """

    contextual: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None:
            require_count("contextual", self.contextual, 2**31, "any image has")

    def check(self, keep: int, site: Site) -> None:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`: at least one token and one mean."""
        if site.tokens is not None:
            self._contextual(keep, site.tokens)

    name = "visionzip"
    title = "VisionZip"
    source = "arXiv 2412.04467"
    families = EVERYWHERE
    classless = f"{RECEIVED}, and no class token among the rows"
    merges = True

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        salience = self.salience(evidence)
        contextual = self._contextual(keep, evidence.tokens)
        dominant = keep - contextual
        features = self.material(evidence)
        if not evidence.class_token:
            return visionzip_merged(features, salience, evidence.keys(), dominant, contextual)
        return visionzip(features, salience, evidence.keys(), dominant, contextual)

    def arranged(self, made: Reduction, evidence: Evidence) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`: tiles' patches by rows of the whole picture."""
        if not evidence.grids or not evidence.class_token:  # without one, rows are in raster order
            return made
        assert evidence.shape is not None
        each = made.slots.shape[1] // evidence.tiles
        contextual = self._contextual(each, evidence.tokens)
        orders = []
        for slots, grid in zip(made.slots, evidence.grids, strict=True):
            patches = slots.unflatten(0, (evidence.tiles, each))[:, 1 : each - contextual] % evidence.tokens
            orders.append(visionzip_tiles(patches, contextual, tiles=grid, side=evidence.shape[0]))
        return made.reordered(torch.stack(orders))

    def _contextual(self, keep: int, tokens: int) -> int:
        """How many of ``keep`` rows are means."""
        count = self.contextual
        if count is None:
            count = min(keep - 1, max(int(0.05 * tokens) if self.behind else round(keep * 10 / 64), 1))
        if not 1 <= count < keep:
            raise ValueError(
                f"VisionZip keeps {keep} tokens, {count} of them means, which must be at least 1 and leave "
                "at least one more: keep more"
            )
        return count


@dataclass(frozen=True, eq=False)
class PruMerge(Reducer):
    """Tokens the class token attends to, each with its nearest others added (arXiv 2403.15388).

    The last row is the sum of all others. Attention is that of the block behind the consumed one, taken as a
    single head.
    """

    name = "prumerge"
    title = "PruMerge"
    source = "arXiv 2403.15388"
    families = adapted(f"{RECEIVED}, and mean keys")
    classless = RECEIVED
    merges = True
    plus = False

    @classmethod
    def note(cls, family: str, *, class_token: bool) -> str:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`; no published budget is a number."""
        told = super().note(family, class_token=class_token)
        return f"{told}; {_FIXED}" if told else _FIXED

    def bound(self, site: Site) -> Reducer:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        if self.behind or max(site.consumed) + 1 < site.num_layers:
            return self
        own = "attention of the consumed layer itself, behind which there is none"
        return replace(self, adaptation=f"{self.adaptation}; {own}")

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        features = self.material(evidence)[:, int(evidence.class_token) :]
        row, keys = evidence.one_head()
        return prumerge(features, row, keys, keep, spread=0.75 if self.plus else 0.0)


@dataclass(frozen=True, eq=False)
class PruMergePlus(PruMerge):
    """:class:`PruMerge` with tokens evenly spread over the picture beside those of high attention."""

    name = "prumerge+"
    title = "PruMerge+"
    plus = True


_FIXED = "a fixed budget, where the published ones follow from the picture or from a ratio"


@dataclass(frozen=True, eq=False)
class ToMe(Reducer):
    """Tokens merged in every block of the encoder, with proportional attention there (arXiv 2210.09461).

    As many in each block, the first ones one more. Behind a merger (Qwen2.5-VL) the same matching is iterated
    on what the merger makes ("ToMe-post").
    """

    name = "tome"
    title = "ToMe"
    source = "arXiv 2210.09461"
    families = adapted(
        "the same matching behind the merger (ToMe-post), for windows forbid it in the encoder"
    )
    classless = None
    merges = True
    in_raster = True

    @property
    def in_tower(self) -> bool:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return not self.behind

    def check(self, keep: int, site: Site) -> None:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`: a block merges at most half."""
        if site.tokens is not None and not self.behind:
            even_schedule(site.tokens, keep, max(site.consumed) + 1)

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        if self.behind:
            return tome_post(evidence.projected(), keep)
        rows, owner, _ = evidence.merged(even_schedule(evidence.tokens, keep, evidence.consumed + 1))
        return Reduction(rows, first_places(owner, keep), owner, evidence.tokens)
