"""Checks of tensor values, without synchronising a GPU."""

from __future__ import annotations

import torch

from ocvtp_kernels._checks import require, require_floating, require_shape

#: Where kernels notice it, after the fact.
NOT_FINITE = (
    "features contains NaN or Inf, or float16 overflows inside the pruner; look at the encoder's dtype and "
    'its input, or try precision="fp32"'
)


def check_fill_scores(scores: torch.Tensor, batch: int, tokens: int) -> None:
    """Raise unless ``scores`` are ``[B, N]``, floating point and finite."""
    require_floating("fill_scores", scores)
    require_shape("fill_scores", scores, (batch, tokens), "[B, N]")
    check_finite("fill_scores", scores)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` if there is NaN or Inf in ``tensor``; on a GPU by an asynchronous assertion."""
    require_finite(
        tensor, f"{name} contains NaN or Inf; look at the encoder's dtype (float16 overflows) and its input"
    )


def require_finite(tensor: torch.Tensor, message: str) -> None:
    """The same with another message."""
    # One reduction, which NaN and Inf survive, and a comparison that NaN fails.
    largest = torch.linalg.vector_norm(tensor.detach(), float("inf"))
    require(largest < float("inf"), message)
