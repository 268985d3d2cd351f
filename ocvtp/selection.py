"""What a pruner decided: which tokens of each image are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ocvtp_kernels._checks import require_shape
from ocvtp_kernels.selection import gather_tokens


@dataclass
class Selection:
    """The kept tokens of a batch of images.

    Attributes:
        indices: ``[B, keep]`` int64, ascending and unique per row.
        from_slots: ``[B]`` int64, how many of them are some slot's top token (the rest are fill).
        slot_attention: ``[B, num_slots, N]``, softmax over slots of the last iteration, or ``None``
            unless it was asked for.
        coverage: ``[B]`` coverage error of the kept tokens, or ``None`` unless it was computed.
        tokens: N, how many tokens per image there were to choose from, or ``None`` if unknown.
    """

    indices: torch.Tensor
    from_slots: torch.Tensor
    slot_attention: torch.Tensor | None = None
    coverage: torch.Tensor | None = None
    tokens: int | None = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``x`` ``[B, N, C]`` at the kept tokens, ``[B, keep, C]``; differentiable.

        Raises:
            ValueError: ``x`` is not of the images and tokens that were selected from, say because its rows
                still hold the class token: indices count from the first patch.
        """
        shape = (self.indices.shape[0], self.tokens, None)
        require_shape("x", x, shape, "[B, N, C] of what was selected from (no class token)")
        return gather_tokens(x, self.indices)
