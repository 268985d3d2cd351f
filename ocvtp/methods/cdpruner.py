"""CDPruner: tokens relevant to the question and unlike each other, by a determinantal point process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ocvtp.methods._inputs import check_features, check_tensor, chosen, cosines, wide
from ocvtp.selection import Selection
from ocvtp_kernels._alike import image_by_image
from ocvtp_kernels._checks import require_floating, require_shape

#: A residual below this share of a token's own is rounding.
EPS = 1e-5
#: A picture whose similarities differ by less than this says nothing about relevance.
FLAT = 1e-6


@torch.no_grad()
def cdpruner(projected: torch.Tensor, relevance: torch.Tensor, keep: int) -> Selection:
    """The tokens of :func:`cdpruner_order`.

    Args:
        projected: ``[B, N, D]`` finite floating point: what enters the language model.
        relevance: ``[B, N]`` finite floating point, at least 0 (:func:`relevance_of`).
        keep: tokens to keep, ``1 <= keep <= N``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    return chosen(cdpruner_order(projected, relevance, keep), projected.shape[1])


@torch.no_grad()
def cdpruner_order(projected: torch.Tensor, relevance: torch.Tensor, keep: int) -> torch.Tensor:
    """Greedy MAP of the kernel ``relevance_i * cosine_ij * relevance_j``, the most relevant token first.

    CDPruner, arXiv 2506.10967. Every step takes the token that adds the largest volume. A residual below 1e-5
    of the token's own is 0, where rounding would rule: beyond the tokens' rank the lowest indices are left.

    Args:
        projected: ``[B, N, D]`` finite floating point; computes in at least float32.
        relevance: ``[B, N]`` finite floating point, at least 0.
        keep: tokens to keep, ``1 <= keep <= N``.

    Returns:
        ``[B, keep]`` int64 in the order of choice, unique per row; the first k are those of ``keep=k``.

    Raises:
        TypeError, ValueError: a wrong type, shape or budget, or NaN or Inf.
    """
    keep = check_features(projected, keep)
    batch, tokens, _ = projected.shape
    check_tensor("projected", projected, (None, None, None), "[B, N, D]", projected)
    check_tensor("relevance", relevance, (batch, tokens), "[B, N] of projected", projected)
    # Relevance only scales volumes: what is left of a token is its square times what is left of its cosines.
    # Each step takes its token's share out of all of them, entry by entry, so there are no sums whose bits
    # would depend on the batch.
    left = cosines(projected)
    # A token's cosine with itself is 1, or 0 if it has no direction, and not what rounding makes of that: it
    # would choose the first where all are as relevant.
    left = left.diagonal_scatter((left.diagonal(dim1=1, dim2=2) > 0.5).to(left.dtype), dim1=1, dim2=2)
    weight = wide(relevance).to(left.dtype).square()
    kept = torch.zeros(batch, tokens, dtype=torch.bool, device=projected.device)
    order = []
    for i in range(keep):
        own = left.diagonal(dim1=1, dim2=2)
        volume = (weight * torch.where(own < EPS, 0.0, own)).masked_fill(kept, -1.0)
        token = volume.argmax(dim=1, keepdim=True)
        order.append(token)
        if i + 1 < keep:
            kept = kept.scatter(1, token, True)
            direction = left.gather(1, token[:, :, None].expand(-1, 1, tokens))
            direction = direction / own.gather(1, token).clamp(min=EPS).sqrt()[:, :, None]
            left = left - direction.mT * direction
    return torch.cat(order, dim=1)


@torch.no_grad()
def relevance_of(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor | Sequence[torch.Tensor],
    *,
    pictures: Sequence[int] | None = None,
) -> torch.Tensor:
    """How relevant each token is to the question, from 0 to 1 within a picture.

    Minus the cosine with each piece of the text (the sign is the published one), mean over pieces, scaled to
    the picture's least and most relevant tokens. Tiles of one picture share a scale, separate pictures don't.

    Args:
        image_embeds: ``[B, N, P]`` finite floating point: patches through the post-layernorm and the visual
            projection of CLIP.
        text_embeds: ``[B, M, P]`` finite floating point: each image's question, in M pieces, by CLIP's text
            tower; or B tensors ``[M, P]``, if some have more pieces.
        pictures: B numbers: images of the same number are tiles of one picture. ``None``: all are pictures.

    Returns:
        ``[B, N]`` in at least float32; 1 everywhere where all tokens are as relevant.

    Raises:
        TypeError, ValueError: a wrong type, shape or length, no pieces, or NaN or Inf.
    """
    require_floating("image_embeds", image_embeds)
    require_shape("image_embeds", image_embeds, (None, None, None), "[B, N, P]")
    check_tensor("image_embeds", image_embeds, (None, None, None), "[B, N, P]", image_embeds)
    batch, _, width = image_embeds.shape
    pictures = range(batch) if pictures is None else pictures
    for name, given in (("text_embeds", text_embeds), ("pictures", pictures)):
        if len(given) != batch:
            raise ValueError(f"{name} must be of {batch} images; got {len(given)}")
    means = []
    for text in text_embeds:
        check_tensor("text_embeds", text, (None, width), "[B, M, P] of image_embeds", image_embeds)
        if len(text) == 0:
            raise ValueError("text_embeds has no pieces; the start and end tokens of an empty text are one")
        means.append(_unit(wide(text)).mean(dim=0))
    if batch == 0:
        return wide(image_embeds).sum(dim=2)
    # Sums along rows: copies of a token get equal values, which a matrix product does not promise.
    (product,) = image_by_image(
        lambda x, text: ((_unit(x) * text[:, None]).sum(dim=2),), wide(image_embeds), torch.stack(means)
    )
    scaled: dict[int, torch.Tensor] = {}
    for picture in dict.fromkeys(pictures):
        tiles = [image for image in range(batch) if pictures[image] == picture]
        values = torch.stack([-product[image] for image in tiles])  # an index list would wait for a GPU
        low, high = values.amin(), values.amax()
        values = torch.where(high - low < FLAT, 1.0, (values - low + 1e-6) / (high - low))
        scaled.update(zip(tiles, values, strict=True))
    return torch.stack([scaled[image] for image in range(batch)])


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
