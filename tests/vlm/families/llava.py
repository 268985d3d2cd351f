"""LLaVA-1.5 with a CLIP tower."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp import OCPruner
from tests.vlm.family import Choice, Family, Inputs, Seen
from tests.vlm.tiny_llava import IMAGE, LAYERS, NONE, ONE, TOKENS, TWO, WIDTH, llava, pixels, prompt


def seen(model: Any, inputs: Inputs, pruner: OCPruner, options: Inputs) -> dict[str, list[Seen]]:
    if "pixel_values" not in inputs:
        return {}
    images = inputs["pixel_values"]
    eager = llava("eager").model.vision_tower
    eager.load_state_dict(model.model.vision_tower.state_dict())
    scores = eager(images, output_attentions=True).attentions[LAYERS - 2].mean((1, 2))[:, 1:]
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    early = states[pruner.config.layer + 1][:, 1:]
    late, every = states[-2][:, 1:], torch.arange(TOKENS)
    rows = model.model.multi_modal_projector(late)

    def project(means: torch.Tensor) -> list[torch.Tensor]:
        return [model.model.multi_modal_projector(means)]

    return {
        "image": [
            Seen([Choice(early[i], scores[i], every, [late[i]], project)], rows[i])
            for i in range(len(images))
        ],
    }


def rows() -> dict[str, Inputs]:
    images = pixels(3)
    return {"one": prompt(ONE, images[:1]), "two": prompt(TWO, images[1:]), "text": prompt(NONE)}


def second() -> Inputs:
    return prompt([43, *[IMAGE] * TOKENS, 44, 45], pixels(1, seed=9))


FAMILIES = [
    Family("llava", llava, WIDTH, rows, seen, second, options=[{"tower": "kept_rows"}]),
]
