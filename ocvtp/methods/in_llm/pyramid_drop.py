"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): several cuts, by what the next layer would see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ocvtp.methods.in_llm.averages import check_average, fraction_that_fits
from ocvtp.methods.in_llm.contract import Choice, Numbering, Rows
from ocvtp.methods.in_llm.fastv import at_vision, fastv_scores
from ocvtp.methods.in_llm.ranking import check_layers, highest
from ocvtp_kernels._checks import as_float, as_int


@dataclass(frozen=True)
class PyramidDrop:
    """Before each of ``layers`` keep ``int(N * ratio)`` of the prompt's N vision tokens.

    Which, says the attention that the layer behind the cut would pay from the prompt's last token, on what it
    would get: its own norm and projections, softmax in float32, averaged over heads. All vision tokens of a
    prompt are one pool.

    Attributes:
        layers: of the cuts, 0-based, ascending.
        ratios: shares of N, not rising; the product is truncated as published: ``int(100 * 0.29) == 28``.
        numbering: of positions behind a cut; ``None`` is ``"renumbered"`` as published, but ``"kept"`` where
            positions have three dimensions, which is our adaptation.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    numbering: Numbering | None = None

    name: ClassVar[str] = "PyramidDrop"
    published_numbering: ClassVar[Numbering] = "renumbered"
    adaptation: ClassVar[str | None] = "positions in three dimensions stay as they are"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers("layers", self.layers, 1))
        object.__setattr__(self, "ratios", _check_ratios(self.ratios, len(self.layers)))
        if self.numbering not in (None, "kept", "renumbered"):
            raise ValueError(f'numbering must be "kept", "renumbered" or None; got {self.numbering!r}')

    @classmethod
    def fit(
        cls,
        average: int | float,
        *,
        depth: int,
        tokens: int | None = None,
        layers: Sequence[int] = (2, 8, 16),
    ) -> PyramidDrop:
        """Ratios ``r, r**2, r**3, ...`` under which layers get ``average`` vision tokens.

        See :meth:`FastV.fit <ocvtp.methods.in_llm.FastV.fit>`. With ``tokens``, truncation is taken into
        account: the average is the highest that isn't above.
        """
        cuts = check_layers("layers", layers, 1)
        share = check_average(average, tokens)

        def got(ratio: float) -> float:
            left = [ratio ** (i + 1) for i in range(len(cuts))]
            if tokens is not None:
                left = [int(tokens * one) / tokens for one in left]
            ends = (*cuts[1:], depth)
            return (cuts[0] + sum(n * (b - a) for n, a, b in zip(left, cuts, ends, strict=True))) / depth

        ratio = fraction_that_fits(got, share, tokens, cls.name, cuts, depth)
        return cls(cuts, tuple(ratio ** (i + 1) for i in range(len(cuts))))

    @property
    def cuts(self) -> tuple[int, ...]:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return self.layers

    def left(self, cut: int, present: int, total: int) -> tuple[int, int]:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return min(int(total * self.ratios[cut]), present), 0

    def choose(self, cut: int, rows: Rows) -> Choice:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        scores = fastv_scores(at_vision(rows.next_attention(rows.last[:, None])[:, :, 0], rows))
        pairs = zip(rows.present, rows.totals, strict=True)
        keep = [self.left(cut, present, total)[0] for present, total in pairs]
        return Choice(highest(scores, keep), evidence={"scores": scores})

    def check(self, heads: int) -> None:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""


def _check_ratios(ratios: Sequence[object], cuts: int) -> tuple[float, ...]:
    numbers = [as_float(ratio) if as_int(ratio) is None else float(as_int(ratio) or 0) for ratio in ratios]
    if any(number is None for number in numbers):
        raise TypeError(f"ratios must be numbers; got {ratios!r}")
    found = tuple(number for number in numbers if number is not None)
    if len(found) != cuts:
        raise ValueError(f"ratios must be one for each of {cuts} layers; got {len(found)}")
    if not all(0 <= number <= 1 for number in found) or list(found) != sorted(found, reverse=True):
        raise ValueError(f"ratios must be in [0, 1] and not rise; got {list(found)}")
    return found
