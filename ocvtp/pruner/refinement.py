"""What follows a selection: moving kept tokens to where they cover more, and saying how much they cover."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels.coverage import refine_measured


@dataclass(frozen=True)
class Refinement:
    """Rounds and measures on the features that the pruner read.

    Attributes:
        rounds: of :func:`ocvtp_kernels.coverage.refine`.
        coverage: whether the coverage error is wanted.
        backend: ``"torch"`` or ``"triton"``.
        batch_invariant: image by image in PyTorch.
    """

    rounds: int
    coverage: bool
    backend: str
    batch_invariant: bool

    def __call__(
        self, features: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kept tokens ``[B, T]``, ascending, and their coverage error ``[B]`` if it is wanted."""
        if self.backend == "triton" and features.dtype == torch.float64:
            features = features.float()
        with torch.no_grad():
            if self.backend == "triton" or not self.batch_invariant:
                indices, error = self._refined(features, indices)
            else:
                indices, error = image_by_image(self._refined, features, indices)
        return indices, error if self.coverage else None

    def _refined(self, features: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return refine_measured(features, indices, self.rounds, backend=self.backend)
