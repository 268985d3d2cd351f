"""Methods that merge what they don't keep: VisionZip, PruMerge, PruMerge+, ToMe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ocvtp.methods import prumerge, tome_post, visionzip, visionzip_merged
from ocvtp.methods.tome import even_schedule, first_places
from ocvtp.selection import Reduction
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.reducer import Reducer, Site
from ocvtp.vlm.rivals.by_attention import RECEIVED


@dataclass(frozen=True, eq=False)
class VisionZip(Reducer):
    """Tokens the class token attends to, and means of groups of the others (arXiv 2412.04467).

    Attributes:
        contextual: rows that are means; the class token is one of the others. Default: 10 of 64, as in all
            published settings; for Qwen2.5-VL 5 % of the image's tokens.
    """

    contextual: int | None = None
    qwen: bool = False

    name = "visionzip"
    title = "VisionZip"
    source = "arXiv 2412.04467"
    families = {"llava": "", "llava_next": "", "qwen2_5_vl": ""}
    classless = f"{RECEIVED}, and no class token among the rows"
    merges = True

    @property
    def projects(self) -> bool:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`; on Qwen2.5-VL it acts behind the merger."""
        return not self.qwen

    def bound(self, site: Site) -> Reducer:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return replace(self, qwen=site.family == "qwen2_5_vl")

    def reduce(
        self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None
    ) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        salience = evidence.salience()
        contextual = self.contextual
        if contextual is None:
            tokens = salience.shape[1]
            contextual = min(keep - 1, max(int(0.05 * tokens) if self.qwen else round(keep * 10 / 64), 1))
        if not 1 <= contextual < keep:
            raise ValueError(
                f"VisionZip keeps {keep} tokens, {contextual} of them means, which must be at least 1 and leave "
                "at least one more"
            )
        dominant = keep - contextual
        features = evidence.projected() if self.qwen else evidence.features()
        if not evidence.class_token:
            return visionzip_merged(features, salience, evidence.keys(), dominant, contextual)
        return visionzip(features, salience, evidence.keys(), dominant, contextual)


@dataclass(frozen=True, eq=False)
class PruMerge(Reducer):
    """Tokens the class token attends to, each with its nearest others added (arXiv 2403.15388).

    The last row is the sum of all others. Attention is that of the block behind the consumed one, taken as a
    single head.
    """

    name = "prumerge"
    title = "PruMerge"
    source = "arXiv 2403.15388"
    families = {"llava": "", "llava_next": "", "qwen2_5_vl": f"{RECEIVED}, and mean keys"}
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
        if site.family != "qwen2_5_vl" and max(site.consumed) + 1 >= site.num_layers:
            raise ValueError(
                f"{self.title} reads the encoder layer behind the one that the projector reads, and this model's "
                "projector reads the last: use another vision_feature_layer"
            )
        return self

    def reduce(
        self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None
    ) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        features = evidence.features()[:, int(evidence.class_token) :]
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

    blocks_run: int | None = None

    name = "tome"
    title = "ToMe"
    source = "arXiv 2210.09461"
    families = {
        "llava": "",
        "llava_next": "",
        "qwen2_5_vl": "the same matching behind the merger (ToMe-post), for windows forbid it in the encoder",
    }
    classless = None
    merges = True

    @property
    def in_tower(self) -> bool:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return self.blocks_run is not None

    @property
    def projects(self) -> bool:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return self.in_tower

    def bound(self, site: Site) -> Reducer:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return self if site.family == "qwen2_5_vl" else replace(self, blocks_run=max(site.consumed) + 1)

    def reduce(
        self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None
    ) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        if self.blocks_run is None:
            return tome_post(evidence.projected(), keep)
        rows, owner, _ = evidence.merged(even_schedule(evidence.tokens, keep, self.blocks_run))
        return Reduction(rows, first_places(owner, keep), owner, evidence.tokens)
