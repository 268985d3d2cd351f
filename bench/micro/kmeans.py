"""The peer of what groups tokens around kept ones: flash-kmeans.

One iteration of its k-means assigns tokens to given centres and averages them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

PEER = "flash-kmeans"  # read at 0.3.1
_MODULE = "flash_kmeans"
#: Its means, in the inputs' dtype, from products in it: catches a wrong function, not rounding.
LOOSE = 5e-2


def grouped(x: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Owners ``[B, N]`` among kept tokens ``[B, T]`` of ``x`` ``[B, N, C]``, and means ``[B, T, C]``."""
    kmeans = importlib.import_module(_MODULE).batch_kmeans_Euclid
    centres = x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))
    owner, means, _ = kmeans(x, indices.shape[1], max_iters=1, init_centroids=centres)
    return owner, means


def why_not(case: Any, device: torch.device) -> str | None:
    """Why it can't be timed."""
    if device.type != "cuda":
        return f"no GPU: {PEER}'s kernels need one"
    if importlib.util.find_spec(_MODULE) is None:
        return f"{PEER} is not installed (pip install {PEER})"
    # It falls back to PyTorch without a word, and that is not what its name promises.
    if "torch" in importlib.import_module(_MODULE).batch_kmeans_Euclid.__module__:
        return f"{PEER} can't import its Triton kernels here, and would run PyTorch instead"
    return None
