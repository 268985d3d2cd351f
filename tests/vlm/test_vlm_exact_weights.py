"""n kinds of tokens, each many times over, pruned to one of each that weighs them all: nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import ocvtp
from ocvtp.vlm.call.weighing import KEY, Weights
from tests.vlm.families import merged
from tests.vlm.family import Inputs, by_name
from tests.vlm.tiny_llava import IMAGE, KEEP, llava
from tests.vlm.tiny_merged import Probe

NEW = 8
KINDS = 5
#: Of two pictures' 16 tokens: every kind is there, and kinds differ in number.
WHICH = [
    torch.tensor([0, 1, 1, 4, 2, 4, 4, 3, 2, 4, 2, 3, 4, 4, 4, 3]),
    torch.tensor([2, 2, 0, 2, 1, 2, 2, 2, 3, 0, 2, 4, 2, 1, 2, 2]),
]


def pictures(unit: int, patch: int = 14) -> torch.Tensor:
    """``[2, 3, S, S]``, of 4 x 4 units that are alike to the last pixel where :data:`WHICH` says so."""
    side = unit * patch
    made = []
    for i, which in enumerate(WHICH):
        kinds = torch.randn(KINDS, 3, side, side, generator=torch.Generator().manual_seed(i))
        rows = kinds[which].view(4, 4, 3, side, side)
        made.append(rows.permute(2, 0, 3, 1, 4).reshape(3, 4 * side, 4 * side))
    return torch.stack(made)


def kept() -> torch.Tensor:
    """``[2, KINDS]``: the middle one of each kind's tokens, ascending."""
    found = []
    for which in WHICH:
        each = [(which == kind).nonzero()[:, 0] for kind in range(KINDS)]
        found.append(torch.stack([tokens[len(tokens) // 2] for tokens in each]).sort().values)
    return torch.stack(found)


def one_position_per_picture(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Positions ``[1, S]`` of a prompt ``[1, S]`` that start at ``first``."""
    step = torch.ones_like(ids)
    step[:, 1:][(ids[:, 1:] == IMAGE) & (ids[:, :-1] == IMAGE)] = 0
    return step.cumsum(1) - 1 + first


@torch.no_grad()
def said(model: Any, row: Inputs, tokens: list[int] | None) -> tuple[list[torch.Tensor], list[int]]:
    """Logits of the last column of a prompt and of ``NEW`` tokens behind it: its own, or ``tokens``."""
    out = model(**row, attention_mask=torch.ones_like(row["input_ids"]), use_cache=True)
    position, logits, own = row["position_ids"][:, -1:], [out.logits[0, -1]], []
    for step in range(NEW):
        own.append(int(logits[-1].argmax()) if tokens is None else tokens[step])
        position = position + 1
        out = model(
            input_ids=torch.tensor([own[-1:]]),
            position_ids=position,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits[0, -1])
    return logits, own


def largest_difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Relative to the largest logit of the step."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_a_picture_of_few_kinds_of_tokens_loses_nothing(name: str, attention: str) -> None:
    family = by_name(name)
    model = getattr(merged, name)(attention)
    with torch.no_grad():  # where a patch is must not matter
        model.model.vision_tower.embeddings.position_embedding.weight.zero_()
    row = {**family.rows()["two"], "pixel_values": pictures(family.unit)}
    # What forward of PaliGemma counts from.
    row["position_ids"] = one_position_per_picture(row["input_ids"], int(name == "paligemma"))
    want, tokens = said(model, row, None)
    probe = Probe(family.unit, 2, kept())
    for options in ({"merge": "projected"}, {"merge": "off"}, {"merge": "features"}):
        if name == "gemma3" and options["merge"] == "features":
            continue
        ocvtp.apply(model, probe, keep=KINDS, weigh=True, **options)  # type: ignore[arg-type]
        selection = ocvtp.vlm.select(model, row["pixel_values"])
        assert selection.mass is not None
        for masses, indices, which in zip(selection.mass, selection.indices, WHICH, strict=True):
            assert torch.equal(masses, torch.bincount(which).float()[which[indices]])
        got, _ = said(model, row, tokens)
        assert largest_difference(got, want) < 1e-4
    ocvtp.apply(model, probe, keep=KINDS, merge="projected", weigh=False)
    unweighed, _ = said(model, row, tokens)
    assert largest_difference(unweighed, want) > 1e-2
    ocvtp.remove(model)
    again, _ = said(model, row, tokens)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_causal_language_model_where_copies_are_alike(attention: str, oc_pruner: Any) -> None:
    """At one position, and seeing each other in full: a causal mask among them would make it approximate."""
    model = llava(attention)
    ocvtp.apply(model, oc_pruner, keep=KEEP, weigh=True)
    language = model.model.language_model
    kinds = torch.randn(1, KINDS, 48, generator=torch.Generator().manual_seed(0))
    before, after = (torch.randn(1, n, 48, generator=torch.Generator().manual_seed(n)) for n in (3, 6))
    mass = torch.bincount(WHICH[0])
    hidden = []
    for rows, weighed in ((kinds.repeat_interleave(mass, 1), False), (kinds, True), (kinds, False)):
        count = rows.shape[1]
        total = 3 + count + 6
        sees = torch.ones(total, total, dtype=torch.bool).tril()
        sees[3 : 3 + count, 3 : 3 + count] = True
        place = torch.cat([torch.arange(3), torch.full((count,), 3), torch.arange(4, 10)])[None]
        bias = torch.cat([torch.zeros(3), mass.log(), torch.zeros(6)])[None]
        passed: Inputs = {KEY: Weights(bias, None)} if weighed else {}
        cache = DynamicCache()
        embeds = torch.cat([before, rows, after], dim=1)
        steps = []
        for step in range(1 + NEW):
            mask = sees[None, None]
            if attention == "eager":  # it adds its mask
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
            out = language(
                inputs_embeds=embeds,
                position_ids=place,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **passed,
            ).last_hidden_state
            steps.append(out[0, -min(6, out.shape[1]) :])
            embeds, place = out[:, -1:], place[:, -1:] + 1
            sees = torch.ones(1, total + step + 1, dtype=torch.bool)
        hidden.append(steps)
    assert largest_difference(hidden[1], hidden[0]) < 1e-4
    assert largest_difference(hidden[2], hidden[0]) > 1e-2
