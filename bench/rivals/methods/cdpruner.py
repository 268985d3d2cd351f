"""CDPruner, from projected features, image and text embeddings."""

from __future__ import annotations

from bench.rivals.golden import Case
from bench.rivals.methods.trim import image_embeds
from ocvtp import methods


def check(case: Case) -> None:
    """``cdpruner_odd`` and ``cdpruner_tower``."""
    if case.name == "tiles":
        case.needless("pixel_values")
        case.needs_tower("relevance", "kept", "separate_kept")
        return
    if case.golden.name == "cdpruner_tower":
        tower = case.beside("tower_clip")
        embeds = image_embeds(
            case["features"],
            tower["vision.post_layernorm.weight"],
            tower["vision.post_layernorm.bias"],
            tower["visual_projection.weight"],
        )
        case.close("image_embeds", embeds)
        projected = case["projected"]
        case.needless("pixel_values", "input_ids")
        case.needs_tower("fixed_text_embeds")
    else:
        projected = case["features"]
    keep = case.params["T"]
    if "image_embeds" in case:
        embeds, text = case["image_embeds"], case["text_embeds"][None]
    else:  # every token is as relevant as any other
        embeds, text = projected.new_ones(1, projected.shape[1], 6), projected.new_ones(1, 1, 6)
    relevance = methods.relevance_of(embeds, text)
    if "relevance" in case:
        case.close("relevance", relevance)
    order = methods.cdpruner_order(projected, relevance, keep)
    case.same("fixed_order" if case.fixed else "order", order)
    kept = methods.cdpruner(projected, relevance, keep).indices
    if "kept" in case:
        case.same("kept", kept)
    else:
        case.equal("kept", kept.tolist(), order.sort(dim=1).values.tolist())
    if case.fixed:
        case.needless("order", "official_kept")
