"""Methods that choose by attention in the vision encoder: FasterVLM, HiPrune, VisPruner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ocvtp.methods import attention_top_k, hiprune, vispruner
from ocvtp.methods._inputs import check_share
from ocvtp.selection import Selection
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.reducer import EVERYWHERE, LLAVA, Reducer, Site, adapted
from ocvtp_kernels._checks import as_int, require_count

#: What stands in for a class token that a tower lacks.
RECEIVED = "attention received from all tokens in the place of the class token's"


@dataclass(frozen=True, eq=False)
class Salient(Reducer):
    """What methods that start from the class token's attention have in common.

    Attributes:
        by: ``"received"`` takes the attention that tokens receive from all in its place: our adaptation, and
            the only way in towers without a class token.
    """

    by: Literal["class_token", "received"] = field(default="class_token", kw_only=True)

    classless = RECEIVED

    def __post_init__(self) -> None:
        if self.by not in ("class_token", "received"):
            raise ValueError(f'by must be "class_token" or "received"; got {self.by!r}')

    def bound(self, site: Site) -> Reducer:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        adaptation = self.adaptation
        if self.by == "received" and RECEIVED not in adaptation:
            adaptation = f"{adaptation}; {RECEIVED}" if adaptation else RECEIVED
        return replace(self, adaptation=adaptation)

    def salience(self, evidence: Evidence) -> torch.Tensor:
        """``[P, N]``, at least float32."""
        return evidence.salience() if self.by == "class_token" else evidence.received(evidence.consumed)


@dataclass(frozen=True, eq=False)
class FasterVLM(Salient):
    """The tokens that the class token attends to most (arXiv 2412.01818)."""

    name = "fastervlm"
    title = "FasterVLM"
    source = "arXiv 2412.01818"
    families = LLAVA
    reads_rows = False

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Selection:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return attention_top_k(self.salience(evidence), keep)


@dataclass(frozen=True, eq=False)
class HiPrune(Reducer):
    """Anchors of a middle layer, their neighbours, and registers of the consumed one (arXiv 2508.00553).

    Attributes:
        alpha: share of the budget for anchors and neighbours.
        object_layer: 0-based index of the middle layer. Default: as far up as the published one, 8 where
            LLaVA-1.5 consumes 22; for Qwen2.5-VL, the one with full attention that is nearest to 15 of 31.
    """

    alpha: float = 0.1
    object_layer: int | None = None

    name = "hiprune"
    title = "HiPrune"
    source = "arXiv 2508.00553"
    families = EVERYWHERE
    reads_rows = False
    reads_places = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        if self.object_layer is not None and as_int(self.object_layer) is None:
            raise TypeError(f"object_layer must be an int; got {self.object_layer!r}")

    @property
    def blocks(self) -> tuple[int, ...]:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return () if self.object_layer is None else (self.object_layer,)

    def check(self, keep: int, site: Site) -> None:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`: neighbours of all anchors must fit."""
        if site.tokens is not None:
            blank = torch.zeros(1, site.tokens)
            hiprune(blank, blank, keep, shape=(1, site.tokens), alpha=self.alpha)

    def bound(self, site: Site) -> Reducer:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        consumed = max(site.consumed)
        told = [block for block in site.blocks if block <= consumed]
        layer = self.object_layer
        if layer is None:
            wanted = consumed * 15 / 31 if self.behind else consumed * 8 / 22
            layer = min(told, key=lambda block: abs(block - wanted))
        elif layer not in told:
            raise ValueError(
                f"HiPrune reads attention over whole pictures, which this tower has in layers {told}; "
                f"object_layer is {layer}"
            )
        return replace(self, object_layer=layer)

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Selection:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        assert self.object_layer is not None
        if evidence.shape is None:
            raise ValueError(
                "HiPrune needs tokens that are rows and columns of a picture, which these are not"
            )
        middle, deep = evidence.received(self.object_layer), evidence.received(evidence.consumed)
        return hiprune(middle, deep, keep, shape=evidence.shape, alpha=self.alpha)


@dataclass(frozen=True, eq=False)
class VisPruner(Salient):
    """Tokens the class token attends to, and of the rest those unlike each other (arXiv 2412.01818v2).

    Attributes:
        important: share of the budget that goes by attention.
        step: tokens that each round of the second part drops.
    """

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("important", self.important)
        require_count("step", self.step, 2**31, "any image has")

    name = "vispruner"
    title = "VisPruner"
    source = "arXiv 2412.01818"
    families = adapted(RECEIVED)

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Selection:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        features = evidence.features()[:, int(evidence.class_token) :]
        return vispruner(features, self.salience(evidence), keep, important=self.important, step=self.step)
