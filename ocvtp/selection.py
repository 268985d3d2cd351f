"""What a pruner decided: which tokens of each image are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ocvtp_kernels._checks import require_shape
from ocvtp_kernels.selection import gather_tokens


@dataclass
class Reduction:
    """Rows that a merging method made of the tokens of a batch of images.

    Where a method averages or sums tokens, indices alone don't say what the language model gets; a
    :class:`Selection` does for methods that only choose.

    Attributes:
        rows: ``[B, T, C]``, in the order in which the method hands them over.
        slots: ``[B, T]`` int64, the token whose place each row takes, unique per image. A row that is of no
            token's own (a class token, the mean of what was dropped) takes that of a dropped token.
        owner: ``[B, N]`` int64, the row that each token is the one source of or went into; -1 for tokens that
            went into none, or into several.
        tokens: N, how many tokens per image there were.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    owner: torch.Tensor
    tokens: int

    def by_place(self) -> Reduction:
        """The same rows in the order of their places, as positions that are not renumbered want them."""
        return self.reordered(self.slots.argsort(dim=1))

    def reordered(self, order: torch.Tensor) -> Reduction:
        """The same rows in another order.

        Args:
            order: ``[B, T]`` int64, a permutation for each image.
        """
        rows = self.rows.gather(1, order[:, :, None].expand_as(self.rows))
        rank = order.argsort(dim=1)
        owner = torch.where(self.owner < 0, self.owner, rank.gather(1, self.owner.clamp(min=0)))
        return Reduction(rows, self.slots.gather(1, order), owner, self.tokens)


@dataclass
class Selection:
    """The kept tokens of a batch of images.

    Attributes:
        indices: ``[B, keep]`` int64, ascending and unique per row.
        from_slots: ``[B]`` int64, how many of them were some slot's top token (the rest are fill), before any
            refinement moved them. -1 for an image in which NaN or Inf was found.
        slot_attention: ``[B, num_slots, N]``, softmax over slots of the last iteration, or ``None``
            unless it was asked for.
        coverage: ``[B]`` coverage error of the kept tokens
            (:func:`ocvtp_kernels.coverage.coverage_error`), or ``None`` unless it was asked for.
        tokens: N, how many tokens per image there were to choose from, or ``None`` if unknown.
        mask: ``[B, keep]`` bool, false where an index only repeats the last one, because the image keeps
            fewer; ``None`` where all images keep as many.
        count: ``[B]`` int64, how many each image keeps; ``None`` with ``mask``.
        met: ``[B]`` bool, whether the image's coverage error is what was asked for; ``None`` with ``mask``.
        mass: ``[B, keep]`` float32, how many tokens each kept one stands for, itself among them; ``None``
            where kept tokens stand for nobody else. With ``reduction``, how many tokens went into each row
            and into no other: 0 for a row of all the rest, or of a class token.
        owner: ``[B, N]`` int64, position among the kept of the token that stands for each; ``None`` with
            ``mass``. With ``reduction``, of the row that each went into, -1 if into none or several; a row
            may stand at the place of a token that is in another.
        reduction: of a method that merges tokens by its own rule, the rows that stand at ``indices``.
    """

    indices: torch.Tensor
    from_slots: torch.Tensor
    slot_attention: torch.Tensor | None = None
    coverage: torch.Tensor | None = None
    tokens: int | None = None
    mask: torch.Tensor | None = None
    count: torch.Tensor | None = None
    met: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    reduction: Reduction | None = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``x`` ``[B, N, C]`` at the kept tokens, ``[B, keep, C]``; differentiable.

        Rows are zero where ``mask`` is false.

        Raises:
            ValueError: ``x`` is not of the images and tokens that were selected from, say because its rows
                still hold the class token: indices count from the first patch. Or a method that merges tokens
                made rows of its own.
        """
        if self.reduction is not None:
            raise ValueError("this method merges tokens: its rows are in reduction.rows, at reduction.slots")
        shape = (self.indices.shape[0], self.tokens, None)
        require_shape("x", x, shape, "[B, N, C] of what was selected from (no class token)")
        rows = gather_tokens(x, self.indices)
        return rows if self.mask is None else torch.where(self.mask[:, :, None], rows, 0.0)
