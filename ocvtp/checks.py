"""Checks of tensor values, without synchronising a GPU."""

from __future__ import annotations

import torch

from ocvtp.watch import Watch, on_host, watch_of_functions
from ocvtp_kernels._checks import require, require_floating, require_shape
from ocvtp_kernels._transforms import is_traced
from ocvtp_kernels.selection import is_finite

#: Where kernels notice it, after the fact.
NOT_FINITE = (
    "features or fill scores contain NaN or Inf, or float16 overflows inside the pruner; look at the "
    'encoder\'s dtype and its input, or try precision="fp32"'
)


def check_fill_scores(scores: torch.Tensor, batch: int, tokens: int) -> None:
    """Raise unless ``scores`` are ``[B, N]`` and floating point."""
    require_floating("fill_scores", scores)
    require_shape("fill_scores", scores, (batch, tokens), "[B, N]")


def not_finite(name: str) -> str:
    """What is said of a tensor with NaN or Inf."""
    return f"{name} contains NaN or Inf; look at the encoder's dtype (float16 overflows) and its input"


def check_finite(name: str, tensor: torch.Tensor, watch: Watch | None = None) -> None:
    """Raise ``ValueError`` if there is NaN or Inf in ``tensor``.

    On a GPU a later call raises it (:mod:`ocvtp.watch`), and compiled code, for a GPU, no call at all: an
    assertion there would end the process's CUDA context. On a CPU compiled code asserts it. ``watch``: whose
    call it is, if that is known.
    """
    if on_host(tensor):
        require_finite(tensor, not_finite(name))
    elif not torch.compiler.is_compiling() and not is_traced(tensor):
        sound = is_finite(tensor if tensor.ndim > 1 else tensor.reshape(1, -1))
        (watch or watch_of_functions()).note(sound, not_finite(name))


def require_finite(tensor: torch.Tensor, message: str) -> None:
    """The same of a tensor on a CPU, with another message."""
    # One reduction, which NaN and Inf survive, and a comparison that NaN fails.
    largest = torch.linalg.vector_norm(tensor.detach(), float("inf"))
    require(largest < float("inf"), message)
