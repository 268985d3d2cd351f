"""Farthest points in the place of fill scores: what tops up the budget where slots are fewer than it.

Of as many slots as tokens are kept, some own no token: no token's largest slot attention is theirs. Their top
tokens are arbitrary. Without them, and topped up by the tokens least like those kept, a pruner that reads the
consumed layer answered better by 1.5 points at 5 % of the tokens on the test bed, alike at 11 %
(``docs/accuracy.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels.diversity import farthest_points

Fill = Literal["attention", "farthest_point"]


@dataclass(frozen=True)
class TopUp:
    """The tokens of slots that own some, topped up by farthest points.

    Attributes:
        backend: ``"torch"`` or ``"triton"``.
        batch_invariant: image by image in PyTorch.
    """

    backend: str
    batch_invariant: bool

    def __call__(
        self, features: torch.Tensor, attention: torch.Tensor, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept tokens ``[B, keep]``, ascending, and how many of them are some slot's, ``[B]``.

        Args:
            features: ``[B, N, C]`` that the slots compete for.
            attention: ``[B, K, N]``, softmax over slots, ``K <= keep``.
            keep: tokens to keep.
        """
        if self.backend == "triton" and features.dtype == torch.float64:
            features = features.float()
        start, count = live_tokens(attention, keep)

        def fill(features: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor]:
            return (farthest_points(features, keep, start=start, backend=self.backend),)

        alone = self.batch_invariant and self.backend == "torch"
        return (image_by_image(fill, features, start) if alone else fill(features, start))[0], count


def live_tokens(attention: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top tokens of the slots that own a token: ``[B, keep]``, ascending and then -1; and how many, ``[B]``.

    A token belongs to the slot whose attention to it is largest, a slot's top token is the one it attends to
    most; the lowest of equals. Several slots may agree on one.

    Args:
        attention: ``[B, K, N]``, ``K <= keep``.
        keep: columns of the result.
    """
    batch, slots, tokens = attention.shape
    lives = torch.zeros(batch, slots, dtype=torch.int32, device=attention.device)
    owner, top = attention.argmax(dim=1), attention.argmax(dim=2)
    lives = lives.scatter(1, owner, 1)
    # Counts, since of two slots that agree only one may live; integers, so in any order.
    named = torch.zeros(batch, tokens, dtype=torch.int32, device=attention.device)
    picked = named.scatter_add(1, top, lives) > 0
    count = picked.sum(dim=1)
    first = (~picked).to(torch.uint8).sort(dim=1, stable=True).indices[:, :keep]
    place = torch.arange(keep, device=attention.device)
    return torch.where(place < count[:, None], first, -1), count
