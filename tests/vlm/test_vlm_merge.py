"""Kept tokens that stand for the others, in every family: against prompts and masks built by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.families import adapter_for
from tests.vlm import standing
from tests.vlm.family import (
    Family,
    Inputs,
    assert_rows_answer_alike,
    by_name,
    families,
    joined,
    numberings,
    steps,
)
from tests.vlm.tiny_llava import IMAGE, KEEP, NONE, ONE, TOKENS, llava, pixels, prompt

CASES = [pytest.param(family, id=family.name) for family in families()]
VARIANTS = [
    pytest.param(family, options, id=f"{family.name}-{'-'.join(map(str, options.values())) or 'default'}")
    for family in families()
    for options in ({}, *family.options)
    if options.get("tower") != "kept_rows"
]


@functools.cache
def _rows(family: Family) -> dict[str, Inputs]:
    return family.rows()


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("merge", ["off", "projected", "features"])
@pytest.mark.parametrize(("family", "options"), VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_the_hand_built_prompt(
    family: Family, options: Inputs, merge: Any, weigh: bool, models: Any
) -> None:
    model, pruner = models(family), family.pruner()
    if merge == "features" and not adapter_for(model).projects_tokens:
        with pytest.raises(ValueError, match='use merge="projected"'):
            ocvtp.apply(model, pruner, keep=family.keep, merge=merge)
        return
    positions = options.get("positions", numberings(family)[-1 if weigh else 0])
    for kind, row in _rows(family).items():
        if kind == "text":
            continue
        ocvtp.remove(model)
        want = standing.by_hand(
            family, model, pruner, row, family.keep, positions, options, merge=merge, weigh=weigh
        )
        standing_for = {"merge": merge, "weigh": weigh}
        ocvtp.apply(model, pruner, keep=family.keep, **{**options, "positions": positions}, **standing_for)
        got = model(**row).logits
        assert got.shape == want.shape, kind
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        if merge != "off" or weigh:
            plain: Inputs = {"merge": "off", "weigh": False, "positions": positions}
            ocvtp.apply(model, pruner, keep=family.keep, **{**options, **plain})
            assert not torch.allclose(got[:, -1], model(**row).logits[:, -1], atol=1e-2), kind


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(family: Family, models: Any) -> None:
    model, rows = models(family), _rows(family)
    batch = family.batch()
    live = batch["attention_mask"].bool()

    def run() -> list[torch.Tensor]:
        said = steps(model, batch)
        return [model(**batch).logits[live], model(**rows["two"]).logits[0], said.sequences, *said.logits]

    want = run()
    merges = ["projected", "features"] if adapter_for(model).projects_tokens else ["projected"]
    for merge in merges:
        ocvtp.apply(model, family.pruner(), keep=1.0, merge=merge, weigh=True)
        for a, b in zip(run(), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*max_error")
@pytest.mark.parametrize("keep", ["number", "share", "auto"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_select_says_for_whom_tokens_stand(name: str, keep: str, models: Any) -> None:
    family = by_name(name)
    model, row, pruner = models(family), _rows(family)["one"], family.pruner()
    row = {key: value for key, value in row.items() if key in family.pixels["image"]}
    options: Inputs = {"number": {"keep": 3}, "share": {"keep": 0.3}}.get(keep, {"keep": "auto"})
    if keep == "auto":
        options |= {"budgets": [2, 4, 6], "max_error": 0.7}
    ocvtp.apply(model, pruner, **options, merge="off", weigh=False)
    plain = ocvtp.vlm.select(model, **row)
    assert plain.mass is None
    assert plain.owner is None
    for standing_for in ({"merge": "projected", "weigh": False}, {"merge": "off", "weigh": True}):
        ocvtp.apply(model, pruner, **options, **standing_for)
        found = ocvtp.vlm.select(model, **row)
        assert torch.equal(found.indices, plain.indices)
        assert found.mass is not None
        assert found.owner is not None
        assert found.owner.shape == (1, found.tokens)
        assert found.mass.shape == found.indices.shape
        assert int(found.mass.sum()) == found.tokens
        count = found.indices.shape[1] if found.mask is None else int(found.mask[0].sum())
        assert torch.equal(
            found.mass[0], torch.bincount(found.owner[0], minlength=len(found.mass[0])).float()
        )
        assert torch.equal(found.owner[0, found.indices[0, :count]], torch.arange(count))
        assert (found.mass[0, :count] >= 1).all()
        assert (found.mass[0, count:] == 0).all()
    ocvtp.apply(model, pruner, keep=1.0, weigh=True)
    every = ocvtp.vlm.select(model, **row)
    assert every.mass is not None
    assert every.owner is not None
    assert (every.mass == 1).all()
    assert torch.equal(every.owner[0], torch.arange(every.tokens))


@pytest.mark.filterwarnings("ignore:.*max_error")
@torch.no_grad()
def test_images_that_keep_different_numbers(model: Any, oc_pruner: Any) -> None:
    """As ``keep="auto"`` has it: each as alone, and as if told its number."""
    images = pixels(2)
    rows = [prompt(ONE, images[:1]), prompt(ONE, images[1:]), prompt(NONE)]
    auto: Inputs = {"keep": "auto", "budgets": [9, 12], "max_error": 0.6}
    standing_for: Inputs = {"merge": "projected", "weigh": True}
    ocvtp.apply(model, oc_pruner, **auto, **standing_for)
    counts = ocvtp.vlm.select(model, images).count
    assert counts is not None
    assert set(counts.tolist()) == {9, 12}
    batch = joined(rows)
    alone = [steps(model, row) for row in rows]
    assert_rows_answer_alike(steps(model, batch), batch["input_ids"].shape[1], alone, rows)
    for keep, row, want in zip(counts.tolist(), rows[:2], alone[:2], strict=True):
        ocvtp.apply(model, oc_pruner, keep=keep, **standing_for)
        said = steps(model, row)
        assert all(torch.equal(a, b) for a, b in zip(said.logits, want.logits, strict=True))


@pytest.mark.parametrize("merge", ["projected", "features"])
@pytest.mark.parametrize("layer", [-2, [2, -2]])
@torch.no_grad()
def test_a_class_token_stands_for_itself(layer: Any, merge: Any, oc_pruner: Any) -> None:
    """With ``vision_feature_select_strategy="full"`` it is the first row of every image."""
    model = llava(strategy="full", layer=layer)
    images = pixels(2)
    row = [1, 5, *[IMAGE] * (TOKENS + 1), 7, *[IMAGE] * (TOKENS + 1), 8]
    made = model.get_image_features(images, return_dict=True).pooler_output
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    read = torch.cat([states[one] for one in layers], dim=-1)
    ocvtp.apply(model, oc_pruner, keep=KEEP, merge=merge, weigh=True)
    indices = ocvtp.vlm.select(model, images).indices
    got = model(**prompt(row, images)).logits
    ocvtp.remove(model)
    pieces, bias = [model.get_input_embeddings()(torch.tensor([1, 5]))], [0.0, 0.0]
    for i, after in enumerate((7, 8)):
        rows, sources = made[i][1:], read[i, 1:]
        owner = standing.nearest(rows if merge == "projected" else sources, indices[i])
        if merge == "projected":
            rows = standing.means(rows, owner, KEEP)
        else:
            rows = model.model.multi_modal_projector(standing.means(sources, owner, KEEP))
        pieces += [made[i][:1], rows, model.get_input_embeddings()(torch.tensor([after]))]
        bias += [0.0, *torch.bincount(owner, minlength=KEEP).log().tolist(), 0.0]
    count = len(bias)
    added = torch.where(torch.ones(count, count).tril() > 0, torch.tensor(bias), torch.finfo().min)
    want = model(inputs_embeds=torch.cat(pieces)[None], attention_mask=added[None, None]).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merge", ["projected", "features"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "qwen3_vl"])
def test_gradients_are_those_of_the_hand_built_prompt(name: str, merge: Any) -> None:
    """They reach the vision side through every token that a kept one stands for."""
    family = by_name(name)
    model, pruner, row = family.model(), family.pruner(), _rows(family)["one"]
    options: Inputs = {"merge": merge, "weigh": True}
    grads = []
    for patched in (False, True):
        model.zero_grad(set_to_none=True)
        if patched:
            positions = numberings(family)[0]
            ocvtp.apply(model, pruner, keep=family.keep, positions=positions, **options)
            logits = model(**row).logits
        else:
            positions = numberings(family)[0]
            logits = standing.by_hand(family, model, pruner, row, family.keep, positions, {}, **options)
        logits[:, -3:].softmax(-1)[..., 5:9].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(word in n for n in grads[0] for word in ("vision_tower", "visual"))
    largest = max(float(grad.abs().max()) for grad in grads[0].values())
    for n, want in grads[0].items():
        torch.testing.assert_close(grads[1][n], want, atol=1e-5 * largest, rtol=1e-3)


@pytest.mark.parametrize("merge", ["off", "projected"])
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_the_projector_sees_each_token_once(family: Family, merge: Any, models: Any) -> None:
    """Owners are found among the rows that are averaged then."""
    model, runs = models(family), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    projectors = {"multi_modal_projector", "connector", "merger"}
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in projectors]
    ocvtp.apply(model, "grid", keep=family.keep, merge=merge, weigh=True)
    handles = [module.register_forward_pre_hook(count) for module in found]
    model(**_rows(family)["one"])
    for handle in handles:
        handle.remove()
    assert (len(found), runs) == (1, 1)


@pytest.mark.parametrize("family", CASES[:1])
def test_what_does_not_fit_is_refused(family: Family, models: Any) -> None:
    model, pruner = models(family), family.pruner()
    before = dict(model.__dict__)
    for wrong, words in (
        ({"merge": "mean"}, "merge must be one of"),
        ({"merge": True}, "merge must be one of"),
        ({"weigh": "yes"}, "weigh must be True"),
        ({"weigh": 1}, "weigh must be True"),
        ({"merge": "projected", "tower": "kept_rows"}, 'use tower="exact"'),
        ({"weigh": True, "tower": "kept_rows"}, 'use tower="exact"'),
    ):
        with pytest.raises(ValueError, match=words):
            ocvtp.apply(model, pruner, keep=2, **wrong)  # type: ignore[arg-type]
    assert model.__dict__ == before
    report = ocvtp.apply(model, pruner, keep=2, merge="auto", weigh="auto", tower="kept_rows")
    assert (report.merge, report.weigh) == ("off", False)
    assert len(report.reasons) == 2
    report = ocvtp.apply(model, pruner, keep=2, merge="auto", weigh="auto")
    assert (report.merge, report.weigh, report.reasons) == ("projected", True, ())
