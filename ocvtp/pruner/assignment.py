"""Slot Attention with everything settled but the features, and what the slots decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ocvtp.checks import NOT_FINITE, check_fill_scores, check_finite, require_finite
from ocvtp.pruner.refinement import Refinement
from ocvtp.pruner.topup import TopUp
from ocvtp.selection import Selection
from ocvtp_kernels._alike import image_by_image, laid_out
from ocvtp_kernels._checks import require, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    Places,
    SlotStart,
    TopTokens,
    normalise_into,
    slot_assignment,
    top_tokens,
    top_tokens_into,
)


@dataclass(frozen=True)
class Plan:
    """A call of :meth:`ocvtp.OCPruner.assign` without its features, from :meth:`ocvtp.OCPruner.prepare`.

    Attributes:
        keep: tokens to keep.
        backend: as asked for.
        resolved: what computes, ``"triton"`` or ``"torch"``.
        tf32: whether float32 products are rounded to TF32.
        weights: folded, in the dtype of the products.
        start: first-iteration constants.
        num_iters: iterations.
        eps: added to a slot's total attention.
        return_attention: whether the map is wanted.
        batch_invariant: image by image in PyTorch.
        refinement: what is done to the selection afterwards, or ``None``.
        topup: what tops up the budget in the place of fill scores, or ``None``.
    """

    keep: int
    backend: str
    resolved: str
    tf32: bool
    weights: FoldedWeights
    start: SlotStart
    num_iters: int
    eps: float
    return_attention: bool
    batch_invariant: bool
    refinement: Refinement | None = None
    topup: TopUp | None = None

    @property
    def needs_map(self) -> bool:
        """Whether somebody reads the whole slot attention map."""
        return self.return_attention or self.topup is not None

    def key(self) -> tuple[object, ...]:
        """Equal for plans that do the same as long as their weights and start are the same."""
        slots = self.start.slots.shape[1]
        return (
            self.keep,
            slots,
            self.backend,
            self.tf32,
            self.weights.query_weight.dtype,
            self.return_attention,
        )

    def run(self, features: torch.Tensor) -> Assignment:
        """Assign ``features`` ``[B, N, in_dim]``; :meth:`ocvtp.OCPruner.prepare` has checked all but NaN."""
        with torch.no_grad(), without_autocast(features.device):
            if self.resolved == "triton":
                top, attention = self._triton(features)
            else:
                top, attention = None, self._torch(features)
        return self.assignment(features, top, attention)

    def assignment(
        self, features: torch.Tensor, top: TopTokens | None, attention: torch.Tensor | None = None
    ) -> Assignment:
        """What was found for ``features``."""
        return Assignment(
            self.keep,
            features.shape[1],
            self.backend,
            top,
            attention,
            self.return_attention,
            self.refinement,
            None if self.refinement is None and self.topup is None else features,
            self.topup,
        )

    def places(self, features: torch.Tensor) -> Places:
        """Memory for what :meth:`find` finds for such features."""
        images, tokens, _ = features.shape
        slots, dtype = self.start.slots.shape[1], self.weights.query_weight.dtype
        return Places.empty(images, tokens, slots, features.device, dtype)

    def normalise(self, features: torch.Tensor, out: torch.Tensor) -> None:
        """Put ``features`` where :meth:`find` reads them: ``[B, N, in_dim]`` in the dtype of the products."""
        normalise_into(_at_most_32_bits(features), out)

    def find(self, normalised: torch.Tensor, places: Places) -> TopTokens:
        """:meth:`run` in Triton from what :meth:`normalise` left, bit for bit, to ``places``."""
        with torch.no_grad(), without_autocast(normalised.device):
            found = top_tokens_into(
                places,
                normalised,
                self.start,
                self.weights,
                num_iters=self.num_iters,
                eps=self.eps,
                backend="triton",
                tf32=self.tf32,
            )
            _look(found)
            return found

    def _triton(self, features: torch.Tensor) -> tuple[TopTokens | None, torch.Tensor | None]:
        """Top tokens or, if it is wanted, the map: both name the same tokens, bit for bit."""
        function = slot_assignment if self.needs_map else top_tokens
        found = function(
            _at_most_32_bits(features),
            self.start,
            self.weights,
            num_iters=self.num_iters,
            eps=self.eps,
            backend="triton",
            tf32=self.tf32,
        )
        if isinstance(found, TopTokens):
            _look(found)
            return found, None
        require_finite(found, NOT_FINITE)
        return None, found

    def _torch(self, features: torch.Tensor) -> torch.Tensor:
        """The map, image by image unless the batch may be computed at once."""
        check_finite("features", features)
        x = laid_out(features, self.start.slots.dtype)

        def assign(x: torch.Tensor, *start: torch.Tensor) -> tuple[torch.Tensor]:
            found = slot_assignment(
                x,
                SlotStart(*start),
                self.weights,
                num_iters=self.num_iters,
                eps=self.eps,
                backend="torch",
            )
            return (found,)

        return (image_by_image(assign, x, *self.start) if self.batch_invariant else assign(x, *self.start))[0]


def _look(found: TopTokens) -> None:
    """Raise for what is not finite."""
    require(found.finite.all(), NOT_FINITE)


def _at_most_32_bits(features: torch.Tensor) -> torch.Tensor:
    """Kernels take no more."""
    return features.float() if features.dtype == torch.float64 else features


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
        refinement: what is done to the selection, or ``None``.
        features: ``[B, N, in_dim]`` that were assigned, if they are refined on or compared.
        topup: what tops up the budget in the place of fill scores, or ``None``.
    """

    keep: int
    tokens: int
    backend: str
    top: TopTokens | None
    attention: torch.Tensor | None
    return_attention: bool = False
    refinement: Refinement | None = None
    features: torch.Tensor | None = None
    topup: TopUp | None = None

    def select(self, fill_scores: torch.Tensor | None = None) -> Selection:
        """Fill the budget and sort.

        Args:
            fill_scores: ``[B, N]``, see :class:`ocvtp.OCPruner`; ``None``: a token's largest slot attention.

        Raises:
            TypeError, ValueError: scores of a wrong type or shape, or with NaN or Inf in them.
        """
        with torch.no_grad():
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
        if x.device != self._source().device or self.features is not None:
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
        if self.topup is not None:
            assert self.attention is not None
            assert self.features is not None
            return self._selection(*self.topup(self.features, self.attention, self.keep))
        if self.top is not None:
            scores = self.top.largest if fill_scores is None else fill_scores
            indices, count, _ = select_from_keys(self.top.keys, self.keep, scores, backend=self.backend)
        else:
            assert self.attention is not None
            indices, count = select_tokens(self.attention, self.keep, fill_scores, backend=self.backend)
        return self._selection(indices, count)

    def _selection(self, indices: torch.Tensor, count: torch.Tensor) -> Selection:
        attention = self.attention if self.return_attention else None
        coverage = None
        if self.refinement is not None:
            assert self.features is not None
            indices, coverage = self.refinement(self.features, indices)
        return Selection(indices, count, attention, coverage, self.tokens)

    def _source(self) -> torch.Tensor:
        source = self.attention if self.top is None else self.top.keys
        assert source is not None
        return source

    def _check(self, fill_scores: torch.Tensor | None) -> None:
        if fill_scores is not None:
            check_fill_scores(fill_scores, self._source().shape[0], self.tokens)
