"""TRIM, from features and its text's embedding."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from ocvtp import methods


def image_embeds(
    features: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, projection: torch.Tensor
) -> torch.Tensor:
    """``[B, N, C]`` -> ``[B, N, P]`` through CLIP's post-layernorm and visual projection."""
    normed = torch.nn.functional.layer_norm(features, features.shape[-1:], weight, bias, 1e-5)
    return normed @ projection.mT


def check(case: Case) -> None:
    """``trim_odd`` and ``trim_tower``."""
    if case.golden.name == "trim_tower":
        tower = case.beside("tower_clip")
        features, text = tower["features"][:, 1:], tower["text_embeds"]
        embeds = image_embeds(
            features,
            tower["vision.post_layernorm.weight"],
            tower["vision.post_layernorm.bias"],
            tower["visual_projection.weight"],
        )
    else:
        features, text = case["features"], case["text_embeds"]
        embeds = image_embeds(features, case.get("norm_weight"), case.get("norm_bias"), case["projection"])
    ratio = float(case.params["ratio"])
    adaptive = ratio < 0
    keep = methods.trim_budget(embeds, text) if adaptive else int(features.shape[1] * ratio) + 1
    case.equal("rows to make", keep - 1, case.params["kept"])
    found = methods.trim(features, embeds, text, keep)
    prefix = "fixed_" if case.fixed else ""
    case.same(f"{prefix}kept", found.slots[:, :-1])
    case.close("fixed_rows", found.rows)
    if case.fixed:
        case.needless("kept", "rows")
        return
    case.close("scores", methods.trim_scores(embeds, text))
    # Official rows are rounded to half precision: one digit of its last place may differ.
    official = case["rows"]
    case.close("rows", found.rows.half(), (official.abs().max() * 2.0**-10).item() + case.golden.tolerance)
