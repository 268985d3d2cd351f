"""What the slots decided, before fill scores complete the budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ocvtp.checks import check_fill_scores
from ocvtp.selection import Selection
from ocvtp_kernels._checks import require_shape
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.slot_attention import TopTokens


@dataclass(frozen=True)
class Assignment:
    """Which token tops which slot, from :meth:`ocvtp.OCPruner.assign`; :meth:`select` selects.

    Attributes:
        keep: tokens to keep.
        tokens: N, how many there are.
        backend: as asked for.
        top: every slot's top token, where kernels found it.
        attention: ``[B, K, N]``, where they did not, or where it is wanted.
        return_attention: whether it is wanted.
    """

    keep: int
    tokens: int
    backend: str
    top: TopTokens | None
    attention: torch.Tensor | None
    return_attention: bool = False

    @torch.no_grad()
    def select(self, fill_scores: torch.Tensor | None = None) -> Selection:
        """Fill the budget and sort.

        Args:
            fill_scores: ``[B, N]``, see :class:`ocvtp.OCPruner`; ``None``: a token's largest slot attention.

        Raises:
            TypeError, ValueError: scores of a wrong type or shape, or with NaN or Inf in them.
        """
        self._check(fill_scores)
        return self.finish(fill_scores)

    def select_rows(
        self, fill_scores: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[Selection, torch.Tensor]:
        """:meth:`select`, and the kept rows of ``x`` ``[B, N, C]`` in the same launch, ``[B, keep, C]``.

        Differentiable in ``x``.

        Raises:
            TypeError, ValueError: as :meth:`select`, and for another shape of ``x``.
        """
        self._check(fill_scores)
        require_shape("x", x, (self._source().shape[0], self.tokens, None), "[B, N, C] of what was assigned")
        if x.device != self._source().device:
            selection = self.finish(fill_scores)
            return selection, gather_tokens(x, selection.indices.to(x.device))
        if self.top is not None:
            scores = self.top.largest if fill_scores is None else fill_scores
            indices, count, rows = select_from_keys(self.top.keys, self.keep, scores, x, backend=self.backend)
            assert rows is not None
        else:
            assert self.attention is not None
            indices, count, rows = select_rows(
                self.attention, self.keep, fill_scores, x, backend=self.backend
            )
        return self._selection(indices, count), rows

    def finish(self, fill_scores: torch.Tensor | None) -> Selection:
        """:meth:`select` with scores that were checked before."""
        if self.top is not None:
            scores = self.top.largest if fill_scores is None else fill_scores
            indices, count, _ = select_from_keys(self.top.keys, self.keep, scores, backend=self.backend)
        else:
            assert self.attention is not None
            indices, count = select_tokens(self.attention, self.keep, fill_scores, backend=self.backend)
        return self._selection(indices, count)

    def _selection(self, indices: torch.Tensor, count: torch.Tensor) -> Selection:
        attention = self.attention if self.return_attention else None
        return Selection(indices, count, attention, tokens=self.tokens)

    def _source(self) -> torch.Tensor:
        source = self.attention if self.top is None else self.top.keys
        assert source is not None
        return source

    def _check(self, fill_scores: torch.Tensor | None) -> None:
        if fill_scores is not None:
            check_fill_scores(fill_scores, self._source().shape[0], self.tokens)
