"""Kept tokens that stand for the others, by hand: whose they are is checked, the rest is computed anew."""

from __future__ import annotations

from typing import Any

import torch

from bench.e2e.prompts import Inputs
from bench.micro.gates import GateError, require_equal, require_error
from ocvtp.vlm import select
from ocvtp.vlm.call.controller import controller_of


def stand_by_hand(
    model: Any, inputs: Inputs, rows: torch.Tensor, places: torch.Tensor, rounding: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of image tokens with means in the place of kept ones, and how many tokens each row stands for.

    Args:
        model: patched, with owners found by what the language model reads.
        inputs: of pictures that are all of one size.
        rows: ``[n, D]`` of all pictures, by the unpatched model.
        places: numbers of the kept rows, what the model adds to pictures among them.
        rounding: of distances that may count as equal, by the mean squared distance to the picture's mean.

    Returns:
        ``[n, D]`` in the dtype of ``rows``, and ``[n]`` float32: 1 for rows that stand for nobody else.

    Raises:
        GateError: an owner that is not the nearest kept token, or a number that is not that of its tokens.
    """
    selection = select(model, **controller_of(model).of_images(inputs))
    owner, mass = selection.owner, selection.mass
    assert owner is not None
    assert mass is not None
    tokens = _tokens(model, rows).unflatten(0, owner.shape)
    kept = tokens.gather(1, selection.indices.to(tokens.device))
    if not torch.isin(kept, places).all():
        raise GateError("ocvtp.vlm.select keeps other tokens than the call does")
    x = rows.double()[tokens]  # [B, N, D]
    means = rows.double()
    counts = torch.ones(len(rows), dtype=torch.float32, device=rows.device)
    for image, own in enumerate(owner):
        spread = (x[image] - x[image].mean(dim=0)).square().sum(dim=1).mean()
        distances = _squared_distances(x[image], rows.double()[kept[image]])
        excess = distances.gather(1, own[:, None])[:, 0] - distances.amin(dim=1)
        require_error("owners: squared distance beyond the nearest's", float(excess.max() / spread), rounding)
        members = torch.nn.functional.one_hot(own, kept.shape[1]).double()  # [N, k]
        number = members.sum(dim=0)
        require_equal("masses", mass[image].double(), number)
        means[kept[image]] = members.T @ x[image] / number[:, None]
        counts[kept[image]] = number.float()
    return means.to(rows.dtype), counts


def _tokens(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that are of a picture's tokens, which LLaVA-NeXT's newlines are not."""
    newline = getattr(model.model, "image_newline", None)
    if newline is None:
        return torch.arange(len(rows), device=rows.device)
    return (rows != newline.to(rows)).any(dim=1).nonzero()[:, 0]


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``[N, D], [k, D] -> [N, k]``."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
