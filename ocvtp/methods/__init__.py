"""Selectors without training, behind the pruner's own :class:`~ocvtp.Selection`: rivals and controls.

    selection = ocvtp.methods.k_medoids(features, keep=64)
    rows = selection.gather(features)

All take a batch, choose ``keep`` distinct tokens per image and never wait for a GPU. The choice for an image
does not depend on the images around it, but for the rounding of matrix products.
"""

from __future__ import annotations

from ocvtp.methods.diverse import farthest_point, greedy_dpp, k_medoids
from ocvtp.methods.plain import attention_top_k, grid, random_tokens

__all__ = ["attention_top_k", "farthest_point", "greedy_dpp", "grid", "k_medoids", "random_tokens"]
