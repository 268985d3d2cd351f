"""TRIM: what is least like the question in CLIP's space, and the mean of everything else."""

from __future__ import annotations

import torch

from ocvtp.methods._inputs import best, check_features, check_tensor, others, owners, rows_of, wide, wide_rows
from ocvtp.methods._outliers import outliers
from ocvtp.selection import Reduction
from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._checks import require_floating, require_shape


def trim(
    features: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor, keep: int
) -> Reduction:
    """The ``keep - 1`` tokens least similar to the text, in raster order, then the mean of all others.

    TRIM, arXiv 2409.10994. The sign is the published one: on CLIP's last layer but one, similarity to the
    text runs against relevance. Neither side is normalised.

    Args:
        features: ``[B, N, C]`` finite floating point: the tower's patches, of which rows are made.
        image_embeds: ``[B, N, P]`` finite floating point: the same through the post-layernorm and the visual
            projection of CLIP.
        text_embeds: ``[B, P]`` finite floating point: each image's question by CLIP's text tower.
        keep: rows to make, the mean among them, ``1 <= keep <= N``.

    Returns:
        :class:`~ocvtp.selection.Reduction` with rows ``[B, keep, C]`` in the features' dtype; the mean comes
        last and takes the place of the last token that went into it. Rows are differentiable in ``features``;
        who is kept has no gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    keep = check_features(features, keep)
    batch, tokens, _ = features.shape
    check_tensor("features", features, (None, None, None), "[B, N, C]", features)
    _check_embeds(image_embeds, text_embeds, (batch, tokens), features)
    kept = best(_unlike(image_embeds, text_embeds), keep - 1).sort(dim=1).values
    dropped = others(kept, tokens)
    (mean,) = image_by_image(lambda x: (x.mean(dim=1, keepdim=True),), wide_rows(rows_of(features, dropped)))
    rows = torch.cat([rows_of(features, kept), mean.to(features.dtype)], dim=1)
    return Reduction(rows, torch.cat([kept, dropped[:, -1:]], dim=1), owners(kept, tokens, keep - 1), tokens)


@torch.no_grad()
def trim_scores(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """What TRIM ranks by, higher is kept: a softmax over the tokens of minus their products with the text.

    Args:
        image_embeds: ``[B, N, P]`` finite floating point, as for :func:`trim`.
        text_embeds: ``[B, P]`` finite floating point.

    Returns:
        ``[B, N]`` in at least float32. :func:`trim` compares products themselves, since small shares may
        round to 0.

    Raises:
        TypeError, ValueError: a wrong type or shape, or NaN or Inf.
    """
    require_floating("image_embeds", image_embeds)
    require_shape("image_embeds", image_embeds, (None, None, None), "[B, N, P]")
    batch, tokens, _ = image_embeds.shape
    _check_embeds(image_embeds, text_embeds, (batch, tokens), image_embeds)
    (scores,) = image_by_image(lambda x: (x.softmax(dim=1),), _unlike(image_embeds, text_embeds))
    return scores


@torch.no_grad()
def trim_budget(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> int:
    """The adaptive budget: how many tokens stand out, and one row for the others.

    Outliers of all :func:`trim_scores` together lie above the third quartile by more than 1.5 interquartile
    ranges. One number for the whole batch, as published: give one image for a budget of its own. Waits for a
    GPU, since the result is a size.

    Returns:
        ``keep`` for :func:`trim`: 1, the mean of all tokens alone, where none stands out. Fewer than a
        quarter of the tokens can.

    Arguments and errors are those of :func:`trim_scores`; no tokens are another.
    """
    scores = trim_scores(image_embeds, text_embeds)
    return outliers(scores) // len(scores) + 1


def _check_embeds(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, shape: tuple[int, int], beside: torch.Tensor
) -> None:
    check_tensor("image_embeds", image_embeds, (*shape, None), "[B, N, P]", beside)
    width = image_embeds.shape[2]
    check_tensor("text_embeds", text_embeds, (shape[0], width), "[B, P] of image_embeds", beside)


def _unlike(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """``[B, N]``, higher is kept."""
    # Sums along rows: copies of a token get equal scores, which a matrix product does not promise.
    (product,) = image_by_image(
        lambda x, text: ((x * text[:, None]).sum(dim=2),), wide(image_embeds), wide(text_embeds)
    )
    return -product
