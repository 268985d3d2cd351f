"""What kept tokens that stand for others have to give: from what transformers sees, by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ocvtp import OCPruner
from tests.vlm.family import Choice, Family, Inputs, Seen, chosen, rope_positions


@dataclass(frozen=True)
class Stood:
    """An image or video after its tokens were chosen.

    Attributes:
        slots: ``[k]`` placeholders that stay.
        rows: ``[k, D]`` for them.
        deep: likewise, of DeepStack layers.
        mass: ``[k]`` how many tokens each stands for.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    deep: list[torch.Tensor]
    mass: torch.Tensor


def nearest(compared: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Position among ``kept`` of each token's owner ``[N]``, by squared distances in float64."""
    far = torch.cdist(compared.double(), compared[kept].double())
    owner = far.argmin(1)
    owner[kept] = torch.arange(len(kept))
    return owner


def means(x: torch.Tensor, owner: torch.Tensor, keep: int) -> torch.Tensor:
    """``[keep, C]``, one by one."""
    return torch.stack([x[owner == i].mean(0) for i in range(keep)])


def stood(image: Seen, pruner: OCPruner, keep: int, merge: str) -> Stood:
    """Every choice's tokens go to their nearest kept one; what the model adds stands for itself."""
    slots, last = chosen(image, pruner, keep)
    if image.compact_rows is not None:  # the published layout: all that matters is their number
        return _compact(image, image.choices[0], last, merge)
    rows, deep = image.rows.clone(), [layer.clone() for layer in image.deep]
    mass = torch.ones(len(rows))
    for choice in image.choices:
        kept, count = _kept(pruner, choice, keep), len(choice.features)
        if len(kept) == count:
            continue
        made, owner = _means(choice, [layer[choice.slots] for layer in (rows, *deep)], kept, merge)
        for layer, of_it in zip((rows, *deep), made, strict=True):
            layer[choice.slots[kept]] = of_it
        mass[choice.slots[kept]] = torch.bincount(owner, minlength=len(kept)).float()
    return Stood(slots, rows[slots], [layer[slots] for layer in deep], mass[slots])


def _kept(pruner: OCPruner, choice: Choice, keep: int) -> torch.Tensor:
    number = min(keep, len(choice.features))
    kept: torch.Tensor = pruner(choice.features[None], number, fill_scores=choice.scores[None]).indices[0]
    return kept


def _means(
    choice: Choice, projected: list[torch.Tensor], kept: torch.Tensor, merge: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows of kept tokens, DeepStack's behind them, and the owner of each candidate."""
    if merge == "features":
        owner = nearest(choice.sources[0], kept)
        return list(choice.project(*(means(x, owner, len(kept)) for x in choice.sources))), owner
    owner = nearest(projected[0], kept)
    if merge == "off":
        return [x[kept] for x in projected], owner
    return [means(x, owner, len(kept)) for x in projected], owner


def _compact(image: Seen, choice: Choice, kept: torch.Tensor, merge: str) -> Stood:
    assert image.compact_rows is not None
    every = image.compact_rows(torch.arange(len(choice.features)))
    (rows,), owner = _means(choice, [every[:-1]], kept, merge)
    mass = torch.bincount(owner, minlength=len(kept)).float()
    return Stood(
        torch.arange(len(kept) + 1),
        torch.cat([rows, every[-1:]]),
        [],
        torch.cat([mass, torch.ones(1)]),
    )


def by_hand(
    family: Family,
    model: Any,
    pruner: OCPruner,
    inputs: Inputs,
    keep: int,
    positions: str,
    options: Inputs,
    *,
    merge: str,
    weigh: bool,
) -> torch.Tensor:
    """Logits of the pruned prompt with merged rows, and log of their masses in a mask of numbers."""
    ids = inputs["input_ids"][0]
    stays, bias = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids))
    found: dict[str, list[Stood]] = {}
    for modality, images in family.seen(model, inputs, pruner, options).items():
        where = (ids == getattr(model.config, f"{modality}_token_id")).nonzero()[:, 0]
        start = 0
        for image in images:
            one = stood(image, pruner, keep, merge)
            columns = where[start : start + len(image.rows)]
            stays[columns] = False
            stays[columns[one.slots]] = True
            bias[columns[one.slots]] = one.mass.log()
            found.setdefault(modality, []).append(one)
            start += len(image.rows)
        assert start == len(where)
    columns = stays.nonzero()[:, 0]
    short = ids[None, columns]
    if family.mrope:
        numbers = rope_positions(model, inputs)[:, :, columns]
    else:
        numbers = columns[None] if positions == "original" else torch.arange(len(columns))[None]
    extra: Inputs = {"position_ids": numbers, "attention_mask": mask(family, short[0], bias[columns] * weigh)}
    if "token_type_ids" in inputs:
        extra["token_type_ids"] = inputs["token_type_ids"][:, columns]
    if any(one.deep for images in found.values() for one in images):
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        outputs = {
            modality: BaseModelOutputWithDeepstackFeatures(
                pooler_output=[one.rows for one in images],
                deepstack_features=[list(layer) for layer in zip(*(one.deep for one in images), strict=True)],
            )
            for modality, images in found.items()
        }
        with_deep: torch.Tensor = model(input_ids=short, mm_encoder_outputs=outputs, **extra).logits
        return with_deep
    embeds = model.get_input_embeddings()(short)
    for modality, images in found.items():
        where = short == getattr(model.config, f"{modality}_token_id")
        embeds = embeds.masked_scatter(where[..., None], torch.cat([one.rows for one in images]))
    out: torch.Tensor = model(inputs_embeds=embeds, **extra).logits
    return out


def mask(family: Family, ids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``[1, 1, n, n]``: who sees whom in a prompt ``[n]`` without a cache, and what is added to whom."""
    count = len(ids)
    sees = torch.ones(count, count, dtype=torch.bool)
    if family.name != "paligemma":  # a prompt of that one sees itself both ways
        sees = sees.tril()
    if family.name == "gemma3":  # an image sees itself both ways
        image = ids == 120
        number = (image & ~torch.nn.functional.pad(image, (1, 0))[:-1]).cumsum(0)
        sees |= image[:, None] & image & (number[:, None] == number)
    low = torch.finfo(torch.float32).min
    return torch.where(sees, bias, low)[None, None]
