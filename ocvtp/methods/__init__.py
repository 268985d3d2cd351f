"""Choosers without training, behind the pruner's own :class:`~ocvtp.Selection`: rivals and controls.

    selection = ocvtp.methods.k_medoids(features, keep=64)
    rows = selection.gather(features)

All take a batch and choose ``keep`` distinct tokens per image; methods that merge make ``keep`` rows
(:class:`~ocvtp.selection.Reduction`). They never wait for a GPU, but where scores decide how many are kept
(:func:`trim_budget`, :func:`prumerge_published`, :func:`globalcom2`). What a published method makes of an
image does not depend on the images around it, to the bit; the choice of the controls doesn't but for the
rounding of matrix products. FasterVLM (arXiv 2412.01818v1) is :func:`attention_top_k` of the class token's
row. ToMe's steps, for a tower to call, are in :mod:`ocvtp.methods.tome`.
"""

from __future__ import annotations

from ocvtp.methods.cdpruner import cdpruner, cdpruner_order, relevance_of
from ocvtp.methods.diverse import farthest_point, greedy_dpp, k_medoids
from ocvtp.methods.divprune import divprune, divprune_order
from ocvtp.methods.globalcom2 import TiledChoice, globalcom2
from ocvtp.methods.hiprune import hiprune
from ocvtp.methods.plain import attention_top_k, grid, random_tokens
from ocvtp.methods.prumerge import one_head_row, prumerge, prumerge_published
from ocvtp.methods.tome import tome_post
from ocvtp.methods.trim import trim, trim_budget, trim_scores
from ocvtp.methods.visionzip import visionzip, visionzip_merged, visionzip_tiles
from ocvtp.methods.vispruner import vispruner, vispruner_order

__all__ = [
    "TiledChoice",
    "attention_top_k",
    "cdpruner",
    "cdpruner_order",
    "divprune",
    "divprune_order",
    "farthest_point",
    "globalcom2",
    "greedy_dpp",
    "grid",
    "hiprune",
    "k_medoids",
    "one_head_row",
    "prumerge",
    "prumerge_published",
    "random_tokens",
    "relevance_of",
    "tome_post",
    "trim",
    "trim_budget",
    "trim_scores",
    "visionzip",
    "visionzip_merged",
    "visionzip_tiles",
    "vispruner",
    "vispruner_order",
]
