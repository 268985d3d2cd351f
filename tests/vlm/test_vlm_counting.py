"""How many tokens a call kept, told afterwards from its cache, by whoever has another way to know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm import PromptTokens, count_prompt_tokens, kept_columns
from tests.vlm import tiny_inside
from tests.vlm.family import Family, by_name, families
from tests.vlm.tiny_llava import GREEDY

every_family = pytest.mark.parametrize("family", families(), ids=lambda family: family.name)


def said(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **options)


def counted(model: Any, inputs: dict[str, Any], output: Any) -> PromptTokens:
    return count_prompt_tokens(
        model, inputs["input_ids"], output.past_key_values, inputs.get("attention_mask")
    )


def image_columns(model: Any, ids: torch.Tensor) -> torch.Tensor:
    kinds = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return torch.isin(ids, torch.tensor([kind for kind in kinds if kind is not None]))


@every_family
def test_columns_are_those_that_the_output_names(family: Family) -> None:
    model = family.model()
    inputs = family.batch()
    ocvtp.apply(model, "random", keep=family.keep, columns=True)
    output = said(model, inputs)
    ids = inputs["input_ids"]
    live = inputs["attention_mask"].bool()
    told = output.columns[:, : ids.shape[1]] >= 0
    seen = kept_columns(ids, output.past_key_values, inputs["attention_mask"])
    assert torch.equal(seen, told & live)
    found = counted(model, inputs, output)
    vision = image_columns(model, ids) & live
    assert torch.equal(found.vision, vision.sum(1))
    assert torch.equal(found.kept, (vision & told).sum(1))
    assert torch.equal(found.read, (told & live).sum(1))
    assert found.in_layers == tuple(float(count) for count in found.kept)
    assert bool((found.kept < found.vision)[found.vision > 0].all())
    assert bool((found.vision > 0).any())


@every_family
def test_beams_and_singles_count_alike(family: Family) -> None:
    model = family.model()
    ocvtp.apply(model, "random", keep=family.keep)
    together = family.batch()
    found = counted(model, together, said(model, together, num_beams=2))
    for number, row in enumerate(family.rows().values()):
        one = counted(model, row, said(model, row))
        assert (one.vision.item(), one.kept.item()) == (found.vision[number], found.kept[number])


@every_family
def test_an_unpatched_model_reads_everything(family: Family) -> None:
    model = family.model()
    inputs = family.batch()
    found = counted(model, inputs, said(model, inputs))
    assert torch.equal(found.kept, found.vision)
    assert torch.equal(found.read, inputs["attention_mask"].sum(1))
    assert torch.equal(kept_columns(inputs["input_ids"], None), torch.ones_like(inputs["input_ids"]).bool())


def test_a_number_of_tokens_is_that_number() -> None:
    family = by_name("llava")
    model = family.model()
    row = family.rows()["one"]
    for keep in (1, 5, 9):
        for pruner in ("grid", "greedy_dpp", "attention"):
            ocvtp.apply(model, pruner, keep=keep)  # type: ignore[arg-type]
            assert counted(model, row, said(model, row)).kept.tolist() == [keep]


def test_rows_that_merged_tokens_count() -> None:
    family = by_name("llava_next")
    model = family.model()
    row = family.rows()["one"]
    for method in ("tome", "visionzip", "prumerge+"):
        ocvtp.apply(model, method, keep=18)  # type: ignore[arg-type]
        output = said(model, row)
        found = counted(model, row, output)
        text = row["input_ids"].shape[1] - int(image_columns(model, row["input_ids"]).sum())
        new = output.sequences.shape[1] - row["input_ids"].shape[1]
        assert output.past_key_values.get_seq_length() - (new - 1) == text + found.kept.item()


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "dart"])
def test_layers_average_what_their_caches_hold(name: str) -> None:
    model = tiny_inside.llava()
    row = tiny_inside.batch([tiny_inside.row("llava", 3, 9)])
    ids = row["input_ids"]
    text = int((ids != tiny_inside.IMAGE).sum())
    ocvtp.apply(model, None, inside=tiny_inside.METHODS[name])
    output = said(model, row)
    new = output.sequences.shape[1] - ids.shape[1] - 1
    held = [layer.get_seq_length() - new - text for layer in output.past_key_values.layers]
    found = counted(model, row, output)
    assert found.kept.tolist() == found.vision.tolist() == [ids.shape[1] - text]
    assert found.in_layers == (pytest.approx(sum(held) / len(held)),)
    assert min(held) < max(held)


def test_a_cache_of_another_call_is_refused() -> None:
    family = by_name("llava")
    model = family.model()
    ocvtp.apply(model, "grid", keep=5)
    inputs = family.batch()
    cache = said(model, inputs).past_key_values
    with pytest.raises(ValueError, match="not of one call"):
        kept_columns(inputs["input_ids"][:2].repeat(5, 1), cache)
    longer = torch.cat([inputs["input_ids"]] * 3, dim=1)
    with pytest.raises(ValueError, match="not of one call"):
        kept_columns(longer, cache)
