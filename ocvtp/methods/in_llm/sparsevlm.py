"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417), its published versions 1.5 and 2 ("SparseVLM+")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ocvtp.methods.in_llm.averages import check_average, fraction_that_fits
from ocvtp.methods.in_llm.contract import Choice, Numbering, Rows
from ocvtp.methods.in_llm.density import density_peaks
from ocvtp.methods.in_llm.gravity import gravity
from ocvtp.methods.in_llm.ranking import check_keep, check_layers, highest, kept_of, of_rows
from ocvtp_kernels._checks import as_int, as_number
from ocvtp_kernels._device import on_device

#: Queries whose attention is held at a time.
_AT_ONCE = 64
#: Tokens kept after each cut, of 576, by what they leave on average (published), and of which the average
#: that goes in can be fitted.
_PUBLISHED: dict[int, dict[int, tuple[int, int, int]]] = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


def text_raters(
    vision: torch.Tensor, is_vision: torch.Tensor, text: torch.Tensor, is_text: torch.Tensor
) -> torch.Tensor:
    """``[B, T]`` bool: words that resemble the image more than the average word does.

    Args:
        vision: ``[B, V, D]`` embeddings of vision tokens; computes in float32.
        is_vision: ``[B, V]`` bool, false on padding.
        text: ``[B, T, D]`` embeddings of the text behind.
        is_text: ``[B, T]`` bool, false on padding.
    """
    alike = vision.float() @ text.float().transpose(1, 2)
    share = alike.masked_fill(~is_text[:, None], float("-inf")).softmax(2)
    # Rows without text are all NaN, those without an image count nothing.
    share = share.masked_fill(~(is_vision[:, :, None] & is_text[:, None]), 0.0)
    mean = share.sum(1) / is_vision.sum(1, keepdim=True).clamp(min=1)
    average = mean.sum(1, keepdim=True) / is_text.sum(1, keepdim=True).clamp(min=1)
    return (mean > average) & is_text


def sparsevlm_scores(
    received: torch.Tensor, raters: torch.Tensor, heads: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What vision tokens receive, averaged over raters and heads.

    Args:
        received: ``[B, H, N]`` float32, summed over raters; zero on padding.
        raters: ``[B]``, how many.
        heads: only so many heads, those through which vision tokens receive most; ``None``: all.

    Returns:
        ``[B, N]`` scores, and ``[B, H]`` what heads are chosen by.
    """
    mass = received.sum(2)
    if heads is not None:
        best = mass.sort(dim=1, descending=True, stable=True).indices[:, :heads]
        received = received.gather(1, best[:, :, None].expand(-1, -1, received.shape[2]))
    return received.mean(1) / raters[:, None], mass


def recycled(scores: torch.Tensor, kept: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, count]`` int64: the dropped tokens of the highest scores, by descending score."""
    return (
        scores.masked_fill(kept, float("-inf")).sort(dim=1, descending=True, stable=True).indices[:, :count]
    )


@dataclass(frozen=True)
class SparseVLM:
    """After each of ``layers`` keep the vision tokens that words which resemble the image attend to most.

    Those words are found once, by embeddings, in the text behind the last image; where there is none, the
    prompt's last token rates. At least one vision token goes at every cut. Version 1 averages some of the
    dropped into new tokens behind the kept ones (:func:`density_peaks`), without the random numbers that
    decide ties in the published code. Version 2 divides the attention by what distance alone makes of it
    (:func:`gravity`), takes some heads, and makes no tokens. All vision tokens of a prompt are one pool.

    Attributes:
        layers: 0-based, after which tokens go, as the authors count them.
        keep: tokens after each of them, without those made; or shares of the prompt's.
        version: 1, which the paper's "1.5" is, or 2.
        recycle: share of the dropped to make tokens of; ``None``: .3, or 0 for version 2.
        cluster_div: one token is made of so many, and one more.
        heads: that rate; ``None``: all, or 14 for version 2.
        floor: of version 2, see :func:`gravity`; ``None`` as published.
        numbering: of positions behind a cut. ``None`` as published: ``"renumbered"`` in version 1, ``"kept"``
            in version 2; ``"kept"`` where positions have three dimensions.
    """

    layers: tuple[int, ...] = (2, 6, 15)
    keep: tuple[int | float, ...] = (300, 200, 110)
    version: Literal[1, 2] = 1
    recycle: float | None = None
    cluster_div: int = 10
    heads: int | None = None
    floor: float | None = 0.05
    numbering: Numbering | None = None

    adaptation: ClassVar[str | None] = (
        "its lists of kept tokens were published for LLaVA-1.5, its rules for positions in one dimension"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers("layers", self.layers, 0))
        object.__setattr__(self, "keep", tuple(check_keep("keep", one) for one in self.keep))
        if len(self.keep) != len(self.layers):
            raise ValueError(f"keep must be one for each of {len(self.layers)} layers; got {len(self.keep)}")
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2; got {self.version!r}")
        if self.recycle is not None:
            share = as_number(self.recycle)
            if share is None or not 0 <= share <= 1:
                raise ValueError(f"recycle must be a share of the dropped tokens; got {self.recycle!r}")
            if share and self.version == 2:
                raise ValueError("recycle is for version 1: version 2 makes no tokens")
        divisor = as_int(self.cluster_div)
        if divisor is None or divisor < 2:
            raise ValueError(f"cluster_div must be an int of at least 2; got {self.cluster_div!r}")
        if self.heads is not None and (as_int(self.heads) or 0) < 1:
            raise ValueError(f"heads must be an int of at least 1, or None; got {self.heads!r}")
        floor = None if self.floor is None else as_number(self.floor)
        if self.floor is not None and (floor is None or not 0 < floor < 1):
            raise ValueError(f"floor must be between 0 and 1, or None; got {self.floor!r}")
        if self.numbering not in (None, "kept", "renumbered"):
            raise ValueError(f'numbering must be "kept", "renumbered" or None; got {self.numbering!r}')

    @classmethod
    def fit(
        cls,
        average: int | float,
        *,
        depth: int,
        tokens: int | None = None,
        layers: Sequence[int] = (2, 6, 15),
        version: Literal[1, 2] = 1,
    ) -> SparseVLM:
        """The published list nearest to ``average``, scaled until layers get that many vision tokens.

        See :meth:`FastV.fit <ocvtp.methods.in_llm.FastV.fit>`; ours, as published lists count what leaves the
        layers. With ``tokens``, those made are counted; for shares, as of 576.
        """
        share, after = check_average(average, tokens), check_layers("layers", layers, 0)
        if version not in _PUBLISHED:
            raise ValueError(f"version must be 1 or 2; got {version!r}")
        if len(after) != 3:
            raise ValueError(f"lists were published for 3 layers; got {list(after)}: write keep=... yourself")
        table = _PUBLISHED[version]
        shape = table[min(table, key=lambda one: abs(one / 576 / share - 1))]
        total, cuts = tokens or 576, tuple(layer + 1 for layer in after)

        def scaled(factor: float) -> SparseVLM:
            numbers = [max(1, round(factor * total * one / shape[0])) for one in shape]
            return cls(after, tuple(numbers), version)

        def got(factor: float) -> float:
            made, present, before, spent = scaled(factor), total, 0, 0
            for number, cut in enumerate(cuts):
                spent, before = spent + present * (cut - before), cut
                present = sum(made.left(number, present, total))
            return (spent + present * (depth - before)) / depth / total

        name = f"SparseVLM {version}"
        found = scaled(fraction_that_fits(got, share, tokens, name, cuts, depth))
        if tokens is not None:
            return found
        return cls(after, tuple(one / total for one in found.keep), version)

    @property
    def name(self) -> str:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return "SparseVLM" if self.version == 1 else "SparseVLM v2"

    @property
    def cuts(self) -> tuple[int, ...]:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return tuple(layer + 1 for layer in self.layers)

    @property
    def published_numbering(self) -> Numbering:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return "renumbered" if self.version == 1 else "kept"

    def left(self, cut: int, present: int, total: int) -> tuple[int, int]:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        if not present:
            return 0, 0
        keep = self.keep[cut]
        kept = min(kept_of(keep, total) if isinstance(keep, float) else keep, present - 1)
        return kept, self._clusters(present - kept)

    def choose(self, cut: int, rows: Rows) -> Choice:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        columns, rates = self._raters(rows)
        received = self._received(rows, columns, rates)
        scores, mass = sparsevlm_scores(received, rates.sum(1), self._heads)
        scores = scores.masked_fill(~rows.is_vision, float("-inf"))
        pairs = zip(rows.present, rows.totals, strict=True)
        left = [self.left(cut, present, total) for present, total in pairs]
        kept = highest(scores, [one[0] for one in left])
        evidence = {"scores": scores, "raters": rows.memory["raters"], "head_mass": mass}
        made = tuple(one[1] for one in left)
        if not any(made):
            return Choice(kept, evidence=evidence)
        gone = [present - one[0] for present, one in zip(rows.present, left, strict=True)]
        merged, stands = self._merged(rows, scores, kept, gone, made)
        return Choice(kept, merged, stands, made, evidence)

    def check(self, heads: int) -> None:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        if self._heads is not None and self._heads > heads:
            raise ValueError(
                f"SparseVLM would let {self._heads} heads rate, and the language model has {heads}: "
                "SparseVLM(heads=...)"
            )

    @property
    def _heads(self) -> int | None:
        return 14 if self.heads is None and self.version == 2 else self.heads

    def _pooled(self, dropped: int) -> int:
        """How many of the dropped are recycled."""
        recycle = (0.3 if self.version == 1 else 0.0) if self.recycle is None else self.recycle
        return min(int(dropped * recycle) + 1, dropped) if recycle else 0

    def _clusters(self, dropped: int) -> int:
        pooled = self._pooled(dropped)
        return pooled // self.cluster_div + 1 if pooled else 0

    def _raters(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns ``[B, T + 1]`` that may rate, and which do: the last one where no word does."""
        if "raters" not in rows.memory:
            vision, text = (of_rows(rows.embeddings, columns) for columns in (rows.vision, rows.text))
            rows.memory["raters"] = text_raters(vision, rows.is_vision, text, rows.is_text)
        words = rows.memory["raters"]
        rates = torch.cat([words, ~words.any(1, keepdim=True)], dim=1)
        return torch.cat([rows.text, rows.last[:, None]], dim=1), rates

    def _received(self, rows: Rows, columns: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        """``[B, H, V]``: what vision tokens receive from raters; zero on padding."""
        total: torch.Tensor | None = None
        for some, do in zip(columns.split(_AT_ONCE, 1), rates.split(_AT_ONCE, 1), strict=True):
            attention = rows.attention(some)
            where = rows.vision[:, None, None].expand(-1, *attention.shape[1:3], -1)
            got = attention.gather(3, where)
            if self.version == 2:
                positions = rows.positions
                distance = positions.gather(1, some)[:, :, None] - positions.gather(1, rows.vision)[:, None]
                got = got / gravity(distance, rows.frequencies, self.floor)[:, None]
            counted = do[:, None, :, None] & rows.is_vision[:, None, None]
            part = got.masked_fill(~counted, 0.0).sum(2)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _merged(
        self,
        rows: Rows,
        scores: torch.Tensor,
        kept: torch.Tensor,
        gone: Sequence[int],
        made: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, C, D]`` means and ``[B, C]`` centres; zero where a row makes fewer.

        Rows that recycle as many are clustered together.
        """
        hidden, alike = rows.hidden, dict[tuple[int, int], list[int]]()
        for row, (dropped, clusters) in enumerate(zip(gone, made, strict=True)):
            if clusters:
                alike.setdefault((self._pooled(dropped), clusters), []).append(row)
        merged = hidden.new_zeros(len(made), max(made), hidden.shape[2])
        stands = rows.vision.new_zeros(len(made), max(made))
        passed = kept | ~rows.is_vision
        for (count, clusters), members in alike.items():
            some = slice(None) if len(members) == len(made) else _on(members, hidden.device)
            pool = recycled(scores[some], passed[some], count)
            states = of_rows(hidden[some], rows.vision[some].gather(1, pool))
            centres, means = density_peaks(states, clusters)
            merged[some, :clusters] = means.to(hidden.dtype)
            stands[some, :clusters] = pool.gather(1, centres)
        return merged, stands


def _on(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return on_device(torch.tensor(numbers), device)
