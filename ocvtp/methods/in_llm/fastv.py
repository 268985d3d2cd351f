"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): one cut, by what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ocvtp.methods.in_llm.averages import fit_single
from ocvtp.methods.in_llm.contract import Choice, Numbering, Rows
from ocvtp.methods.in_llm.one_cut import OneCut
from ocvtp.methods.in_llm.ranking import check_keep, check_layer, highest


def fastv_scores(attention: torch.Tensor) -> torch.Tensor:
    """``[B, H, N] -> [B, N]`` float32: attention of the prompt's last token, averaged over heads."""
    return attention.float().mean(1)


@dataclass(frozen=True)
class FastV(OneCut):
    """Before layer ``layer``, keep the vision tokens that the last token attended to most in the one before.

    The choice is made once, when the prompt is read, as in the authors' versions with a cache. Their mask and
    in-place versions differ in that they rank again at every token. Positions stay. All vision tokens of a
    prompt are one pool.

    Attributes:
        layer: K, 0-based: layers before it see every token.
        keep: vision tokens of a prompt from there on, or a share of them.
    """

    layer: int = 2
    keep: int | float = 0.5

    name: ClassVar[str] = "FastV"
    numbering: ClassVar[Numbering | None] = None
    published_numbering: ClassVar[Numbering] = "kept"
    adaptation: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", check_layer("layer", self.layer))
        object.__setattr__(self, "keep", check_keep("keep", self.keep))

    @classmethod
    def fit(cls, average: int | float, *, depth: int, tokens: int | None = None, layer: int = 2) -> FastV:
        """The settings under which layers get ``average`` vision tokens, by what goes into each.

        Args:
            average: tokens, or a share of them.
            depth: layers of the language model.
            tokens: vision tokens of a prompt; may be left out for a share.
            layer: of the cut.

        Raises:
            TypeError, ValueError: an average that this layer can't have; the message has the range.
        """
        return cls(layer, fit_single(average, depth, tokens, layer))

    def choose(self, cut: int, rows: Rows) -> Choice:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        attention = rows.attention(rows.last[:, None])[:, :, 0]
        scores = fastv_scores(at_vision(attention, rows))
        keep = [self.left(cut, present, present)[0] for present in rows.present]
        return Choice(highest(scores, keep), evidence={"scores": scores})

    def check(self, heads: int) -> None:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""


def at_vision(attention: torch.Tensor, rows: Rows) -> torch.Tensor:
    """``[B, H, S] -> [B, H, V]``: what vision tokens get of it; ``-inf`` on padding."""
    where = rows.vision[:, None].expand(-1, attention.shape[1], -1)
    return attention.gather(2, where).masked_fill(~rows.is_vision[:, None], float("-inf"))
