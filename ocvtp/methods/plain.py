"""Selectors that never look at features: by chance, by place, by attention."""

from __future__ import annotations

import math

import torch

from ocvtp.checks import check_fill_scores
from ocvtp.methods._inputs import check_features, chosen, settled, sound_images
from ocvtp.pruner.noise import seeded_normal
from ocvtp.selection import Selection
from ocvtp.watch import OnInvalid
from ocvtp_kernels._checks import as_int, require_count, require_floating, require_shape
from ocvtp_kernels._device import on_device


@torch.no_grad()
def random_tokens(features: torch.Tensor, keep: int, *, seed: int = 0) -> Selection:
    """``keep`` tokens by chance, every set of them alike probable: the control no table should lack.

    Args:
        features: ``[B, N, C]`` floating point; only its shape and device matter.
        keep: tokens to keep, ``1 <= keep <= N``.
        seed: ``0 <= seed < 2**63``; image ``b`` of the batch draws from ``seed + b``.

    Raises:
        TypeError, ValueError: a wrong type, shape, budget or seed.
    """
    keep = check_features(features, keep)
    start = as_int(seed)
    if start is None or not 0 <= start < 2**63:
        raise ValueError(f"seed must be an int in [0, 2**63); got {seed!r}")
    batch, tokens, _ = features.shape
    # The order of independent draws of one distribution is a uniformly random permutation.
    draws = [seeded_normal(1, tokens, (start + image) % 2**63) for image in range(batch)]
    order = torch.cat(draws).argsort(dim=1)
    return chosen(on_device(order[:, :keep], features.device), tokens)


@torch.no_grad()
def grid(features: torch.Tensor, keep: int, *, shape: tuple[int, int] | None = None) -> Selection:
    """``keep`` tokens evenly spread over the image, the same for all: what pooling by place would keep.

    As many rows as make the steps down and across most alike, evenly spaced; the budget is divided among
    them as evenly as it can be, and each row's share is spread evenly over the row.

    Args:
        features: ``[B, N, C]`` floating point; only its shape and device matter.
        keep: tokens to keep, ``1 <= keep <= N``.
        shape: rows and columns of the patches, in raster order; default: a square.

    Raises:
        TypeError, ValueError: a wrong type or budget, or a shape that does not make N.
    """
    keep = check_features(features, keep)
    batch, tokens, _ = features.shape
    height, width = (math.isqrt(tokens),) * 2 if shape is None else shape
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are not {height} x {width} patches; give shape=(rows, columns)")
    down = min(height, max(-(-keep // width), round(math.sqrt(keep * height / width)), 1))
    down = min(down, keep)
    places = []
    for row in range(down):
        y = (2 * row + 1) * height // (2 * down)
        across = keep * (row + 1) // down - keep * row // down
        places += [y * width + (2 * column + 1) * width // (2 * across) for column in range(across)]
    return chosen(on_device(torch.tensor([places]), features.device).expand(batch, -1), tokens)


@torch.no_grad()
def attention_top_k(scores: torch.Tensor, keep: int, *, on_invalid: OnInvalid = "raise") -> Selection:
    """The ``keep`` tokens of the highest score, of equals the first: attention pruning as most methods do it.

    Args:
        scores: ``[B, N]`` finite floating point, say what each token receives
            (:func:`ocvtp_kernels.received_attention.received_attention`), or the class token's row.
        keep: tokens to keep, ``1 <= keep <= N``.
        on_invalid: of images with NaN or Inf, see :class:`ocvtp.OCPruner`.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf (on a GPU a later call raises it).
    """
    require_floating("scores", scores)
    require_shape("scores", scores, (None, None), "[B, N]")
    batch, tokens = scores.shape
    keep = require_count("keep", keep, tokens, "the number of tokens N")
    check_fill_scores(scores, batch, tokens)
    sound = sound_images("fill_scores", scores, on_invalid)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return settled(chosen(kept, tokens), sound, "fill_scores", on_invalid)
