"""What follows a selection: moving kept tokens to where they cover more, and saying how much they cover."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
            if self.backend == "triton" or not self.batch_invariant or len(features) == 1:
                return self._at_once(features, indices)
            parts = [self._at_once(features[i : i + 1], indices[i : i + 1]) for i in range(features.shape[0])]
            coverage = [error for _, error in parts if error is not None]
            return torch.cat([kept for kept, _ in parts]), torch.cat(coverage) if coverage else None

    def _at_once(
        self, features: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        indices, error = refine_measured(features, indices, self.rounds, backend=self.backend)
        return indices, error if self.coverage else None
