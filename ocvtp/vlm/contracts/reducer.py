"""A rival method: what it reads, where it can work, and what it makes of pictures."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

import torch

from ocvtp.selection import Reduction, Selection
from ocvtp.vlm.contracts.evidence import Evidence

Rival = Literal[
    "cdpruner",
    "divprune",
    "fastervlm",
    "hiprune",
    "prumerge",
    "prumerge+",
    "tome",
    "trim",
    "visionzip",
    "vispruner",
]
#: Families where a method is as published.
LLAVA: Final[Mapping[str, str]] = MappingProxyType({"llava": "", "llava_next": ""})
EVERYWHERE: Final[Mapping[str, str]] = MappingProxyType({**LLAVA, "qwen2_5_vl": ""})


def adapted(how: str) -> Mapping[str, str]:
    """:data:`LLAVA` as published, and Qwen2.5-VL by an adaptation of ours."""
    return MappingProxyType({**LLAVA, "qwen2_5_vl": how})


@dataclass(frozen=True, eq=False)
class Site:
    """The model that a method is to work on.

    Attributes:
        family: its ``model_type``.
        class_token: whether its tower has one.
        consumed: encoder layers that the projector reads.
        num_layers: of the tower.
        blocks: whose received attention can be told, ascending.
        tokens: candidates of every image; ``None`` where images differ.
        square: whether they are rows and columns of a picture.
        extra_rows: rows of an image that are always handed over: a class token.
        model: the model itself.
    """

    family: str
    class_token: bool
    consumed: tuple[int, ...]
    num_layers: int
    blocks: tuple[int, ...]
    tokens: int | None
    square: bool
    extra_rows: int
    model: Any


@dataclass(frozen=True, eq=False)
class Reducer(abc.ABC):
    """A method that chooses or merges tokens after, or in, the vision tower. Holds no state of a call.

    Attributes:
        name: for :func:`ocvtp.apply` and the report.
        title: as its authors spell it.
        source: paper.
        families: ``model_type`` -> what is our adaptation there; empty where it is as published.
        classless: what is our adaptation to towers without a class token; ``None`` if it takes none.
        merges: whether it makes rows (:class:`~ocvtp.selection.Reduction`) rather than choose tokens.
        in_raster: whether the rows that it makes are in the order of their places.
        reads_text: whether the question matters, so that one may have to be given.
        pooled: whether all tiles of an image are chosen from together, or else each tile has its share.
        reads_places: whether tokens must be rows and columns of a picture.
        reads_rows: whether it compares what the consumed layer puts out, so that all of it is computed.
        read_layer: like a selector's; none.
        adaptation: what is ours on the model it is bound to; empty where it is as published.
        behind: whether rows are made of what the language model reads, since the tower ends in a merger of
            patches; or else of what the projector reads.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    families: ClassVar[Mapping[str, str]]
    classless: ClassVar[str | None] = ""
    merges: ClassVar[bool] = False
    in_raster: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    reads_places: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = True
    read_layer: ClassVar[None] = None
    adaptation: str = field(default="", kw_only=True, repr=False)
    behind: bool = field(default=False, kw_only=True, repr=False)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks whose attention it asks for, beside the consumed one."""
        return ()

    @property
    def in_tower(self) -> bool:
        """Whether it runs the tower itself (:meth:`~ocvtp.vlm.contracts.evidence.Evidence.merged`)."""
        return False

    @property
    def reads_prompt(self) -> bool:
        """Whether it looks for the question in the prompt."""
        return self.reads_text

    def material(self, evidence: Evidence) -> torch.Tensor:
        """``[P, N, C]``, or with a class token ``[P, 1 + N, C]``: what rows are made of."""
        return evidence.projected() if self.behind else evidence.features()

    @property
    def account(self) -> str:
        """For the report: settings, paper, and what is our adaptation."""
        adapted = f"our adaptation: {self.adaptation}" if self.adaptation else "as published"
        return f"{adapted}, {self.source}"

    @classmethod
    def note(cls, family: str, *, class_token: bool) -> str:
        """What is our adaptation on such a model; empty where it is as published."""
        told = cls.families[family]
        return told if told or class_token or family == "qwen2_5_vl" else cls.classless or ""

    def bound(self, site: Site) -> Reducer:
        """The same, made up for one model: layers that were left open are chosen.

        Raises:
            ValueError: the method can't work there; says what it needs.
        """
        return self

    def check(self, keep: int, site: Site) -> None:  # noqa: B027 (most can keep any number)
        """Raise ``ValueError`` if it can't keep so many tokens of an image, fewer than there are."""

    @abc.abstractmethod
    def reduce(
        self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None
    ) -> Selection | Reduction:
        """What is left of each picture, or of all tiles of a segment together if it is :attr:`pooled`.

        Args:
            evidence: of the segments.
            keep: tokens of a picture (or of a segment), fewer than there are.
            questions: per segment the ids of the text that asks about it, if it :attr:`reads_text`.
        """

    def arranged(self, made: Reduction, evidence: Evidence) -> Reduction:
        """Rows of whole segments, tile after tile, in the order in which the method hands them over."""
        return made

    def close(self) -> None:  # noqa: B027 (a method may hold something)
        """Like a selector's; it holds nothing."""
