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
    Beside one product of all tokens with all, ``keep ** 2 * N`` operations.

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
    weight = wide(relevance).to(torch.promote_types(projected.dtype, torch.float32)).square()
    return _greedy(cosines(projected), weight, keep)


def _greedy(similar: torch.Tensor, weight: torch.Tensor, keep: int) -> torch.Tensor:
    """``[B, keep]`` int64 in the order of choice, by a Cholesky factor that gains a row with every choice.

    Relevance only scales volumes: what is left of a token is its square times what is left of its cosines.
    The factor is that of Chen, Zhang and Zhou, arXiv 1709.05135. All is computed entry by entry, so neither
    the batch nor a token's place changes bits, and tokens of equal cosines stay equal.

    Args:
        similar: ``[B, N, N]`` cosines.
        weight: ``[B, N]`` squares of relevance.
        keep: tokens to keep.
    """
    batch, tokens = weight.shape
    # A token's cosine with itself is 1, or 0 if it has no direction, and not what rounding makes of that: it
    # would choose the first where all are as relevant.
    left = (similar.diagonal(dim1=1, dim2=2) > 0.5).to(similar.dtype)
    factor = similar.new_empty(batch, keep - 1, tokens)  # row i: all along the i-th choice's own direction
    order: list[torch.Tensor] = []
    for i in range(keep):
        volume = weight * torch.where(left < EPS, 0.0, left)
        if order:
            volume = volume.scatter(1, torch.cat(order, dim=1), -1.0)
        token = volume.argmax(dim=1, keepdim=True)
        order.append(token)
        if i + 1 < keep:
            at = token[:, :, None]
            row = similar.gather(1, at.expand(-1, 1, tokens))[:, 0]
            known = factor[:, :i].gather(2, at.expand(-1, i, 1))
            row = row - _sum(factor[:, :i] * known)
            own = left.gather(1, token)
            # A token without a residual takes nothing away; its rounding, scaled up each time, overflows.
            direction = torch.where(own < EPS, 0.0, row / own.clamp(min=EPS).sqrt())
            left = left - direction.square()
            factor[:, i] = direction
    return torch.cat(order, dim=1)


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """``[B, N]``: sums of the rows of ``terms`` ``[B, k, N]``, which are overwritten.

    By halves: a library's sum, or a product, may round the last columns otherwise than the first.
    """
    count = terms.shape[1]
    if count == 0:
        return terms.new_zeros(terms.shape[0], terms.shape[2])
    while count > 1:
        half = count // 2
        terms[:, :half] += terms[:, count - half : count]
        count -= half
    return terms[:, 0]


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
