"""One suite that every family passes: the list of the LLaVA-1.5 drop-in."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, LlamaForCausalLM

import ocvtp
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.layouts import packing, qwen_geometry, squares
from tests.vlm.family import Family, Inputs, assert_rows_answer_alike, by_hand, families, joined, steps
from tests.vlm.skips import (
    IMAGES_BEHIND_CACHE,
    NATIVE_ROUTE,
    VERSION,
    needs_chunked_prefill,
    needs_mm_route,
    needs_original,
)
from tests.vlm.tiny_llava import GREEDY, PAD, PLAIN, text_config

NEW = GREEDY["max_new_tokens"]
CASES = [pytest.param(family, id=family.name) for family in families()]
VARIANTS = [
    pytest.param(family, options, id=f"{family.name}-{'-'.join(map(str, options.values())) or 'default'}")
    for family in families()
    for options in ({}, *family.options)
]


@functools.cache
def _rows(family: Family) -> dict[str, Inputs]:
    return family.rows()


@pytest.fixture(params=["mm_encoder_outputs", "inputs_embeds"])
def any_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "mm_encoder_outputs":
        needs_mm_route()
    monkeypatch.setattr("ocvtp.vlm.resolving.route_of", lambda model: request.param)
    return request.param


def skip_unfit(family: Family, model: Any, route: str) -> None:
    if route == "inputs_embeds" and adapter_for(model).needs_mm_route:
        with pytest.raises(ValueError, match=r"needs transformers >= 5\.18"):
            ocvtp.apply(model, family.pruner(), keep=family.keep)
        pytest.skip("its features can't be handed over as embeddings")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(family: Family, models: Any, any_route: str) -> None:
    model, rows = models(family), _rows(family)
    skip_unfit(family, model, any_route)
    batch = family.batch()
    live = batch["attention_mask"].bool()
    want = [model(**batch).logits[live], model(**rows["two"]).logits[0], model.generate(**batch, **GREEDY)]
    deltas = getattr(model.model, "rope_deltas", None)
    for options in ({}, *family.options):
        if options.get("tower") == "kept_rows":
            continue  # rounds differently, as it says
        ocvtp.apply(model, family.pruner(), keep=1.0, **options)
        got = [
            model(**batch).logits[live],
            model(**rows["two"]).logits[0],
            model.generate(**batch, **GREEDY),
        ]
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        if deltas is not None:
            assert torch.equal(model.model.rope_deltas, deltas)


@pytest.mark.parametrize(("family", "options"), VARIANTS)
@torch.no_grad()
def test_pruned_logits_are_those_of_the_hand_built_prompt(
    family: Family, options: Inputs, models: Any, any_route: str
) -> None:
    model, pruner = models(family), family.pruner()
    skip_unfit(family, model, any_route)
    for positions in [options["positions"]] if "positions" in options else family.positions:
        if positions == "original" and not family.mrope:
            needs_original()
        for kind, row in _rows(family).items():
            if kind == "text":
                continue
            ocvtp.remove(model)
            want = by_hand(family, model, pruner, row, family.keep, positions, options)
            unpruned = model(**row).logits
            ocvtp.apply(model, pruner, keep=family.keep, **{**options, "positions": positions}, **PLAIN)
            got = model(**row).logits
            assert got.shape == want.shape, kind
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            assert got.shape[1] < unpruned.shape[1]
            assert not torch.allclose(got[:, -1], unpruned[:, -1], atol=1e-2)


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_left_padded_batch_equals_its_rows(
    family: Family, options: Inputs, models: Any, any_route: str
) -> None:
    model, rows = models(family), list(_rows(family).values())
    skip_unfit(family, model, any_route)
    ocvtp.apply(model, family.pruner(), keep=family.keep, **options)
    batch = family.batch()
    width = batch["input_ids"].shape[1]
    out = steps(model, batch)
    assert torch.equal(out.sequences[:, :width], batch["input_ids"])
    assert out.past_key_values.get_seq_length() < width
    assert_rows_answer_alike(out, width, [steps(model, row) for row in rows], rows)


@pytest.mark.parametrize("family", CASES)
def test_beams_and_returned_sequences(family: Family, models: Any, any_route: str) -> None:
    model, rows = models(family), list(_rows(family).values())
    skip_unfit(family, model, any_route)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    batch = family.batch()
    width = batch["input_ids"].shape[1]
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    out = model.generate(**batch, **options)
    assert out.shape == (2 * len(rows), width + NEW)
    for i, row in enumerate(rows):
        alone = model.generate(**row, **options)
        assert torch.equal(alone[:, row["input_ids"].shape[1] :], out[2 * i : 2 * i + 2, width:])


@pytest.mark.parametrize("family", CASES)
def test_static_cache_sampling_and_no_cache(family: Family, models: Any) -> None:
    model, row = models(family), _rows(family)["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    batch = family.batch()
    want = model.generate(**batch, **GREEDY)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**batch, **GREEDY, **static), want)
    assert torch.equal(model.generate(**row, **GREEDY, use_cache=False), model.generate(**row, **GREEDY))
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(model.generate(**row, do_sample=True, max_new_tokens=NEW))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("family", CASES)
def test_chunked_prefill(family: Family, models: Any) -> None:
    needs_chunked_prefill()
    model, row = models(family), _rows(family)["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model.generate(**row, **GREEDY)
    for chunk in (3, 64):
        assert torch.equal(model.generate(**row, **GREEDY, prefill_chunk_size=chunk), want)


@pytest.mark.parametrize("family", CASES)
def test_lookup_and_an_assistant(family: Family, models: Any) -> None:
    needs_mm_route()
    model, row = models(family), _rows(family)["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY, prompt_lookup_num_tokens=2), want)
    if not family.mrope and "token_type_ids" not in row:  # upstream hands the assistant what it can't take
        torch.manual_seed(5)
        assistant = LlamaForCausalLM(text_config(hidden_size=32)).eval()
        assert torch.equal(model.generate(**row, **GREEDY, assistant_model=assistant), want)


@pytest.mark.parametrize("family", CASES)
def test_loss_of_a_padded_batch_is_the_mean_over_tokens(family: Family, models: Any, any_route: str) -> None:
    model = models(family)
    skip_unfit(family, model, any_route)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    rows = []
    for row in _rows(family).values():
        ids = row["input_ids"]
        labels = torch.where(ids >= 100, -100, ids)
        rows.append({**row, "labels": labels})
    losses, counts = [], []
    for row in rows:
        losses.append(float(model(**row).loss.detach()))
        counts.append(int((row["labels"][:, 1:] != -100).sum()))
    batch = model(**joined(rows, "right"))
    want = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert float(batch.loss.detach()) == pytest.approx(want, rel=1e-4)
    batch.loss.backward()
    names = ("visual", "vision_tower", "vision_model")
    tower = next(getattr(model.model, name) for name in names if hasattr(model.model, name))
    graded = [p.grad for p in tower.parameters() if p.grad is not None]
    assert any(bool(grad.abs().max() > 0) for grad in graded)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("own_cache", [True, False])
def test_turns_equal_one_long_prompt(family: Family, models: Any, own_cache: bool) -> None:
    """A text follow-up, then a new image, on a cache that goes on."""
    if not family.turns:
        pytest.skip("what follows the first turn is attended to in another way than in one prompt")
    model, first, second = models(family), _rows(family)["two"], family.second()
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    cache = DynamicCache() if own_cache else None
    turn = steps(model, first, past_key_values=cache)
    turns: list[Inputs] = [{"input_ids": torch.tensor([[40, 41, 42]])}]
    if IMAGES_BEHIND_CACHE and Version(family.image_turns) <= VERSION:
        turns.append(second)
    images = _visual(family, first)
    for new in turns:
        cache = cache if own_cache else turn.past_key_values
        ids = torch.cat([turn.sequences, new["input_ids"]], dim=1)
        given = _conversation(model, ids, first)
        fresh_pixels = _visual(family, new)
        images = joined_pixels(images, fresh_pixels)
        turn = steps(model, {**given, **fresh_pixels}, past_key_values=cache)
        assert torch.equal(turn.sequences[:, : ids.shape[1]], ids)
        fresh = steps(model, {**given, **images})
        assert torch.equal(turn.sequences, fresh.sequences)
        for a, b in zip(turn.logits, fresh.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert turn.past_key_values.get_seq_length() == fresh.past_key_values.get_seq_length()


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_decoding_by_hand(family: Family, models: Any) -> None:
    """``forward`` on the cache of a pruned ``forward``, token by token."""
    model, row = models(family), _rows(family)["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model.generate(**row, **GREEDY)[0, row["input_ids"].shape[1] :].tolist()
    out = model(**row, use_cache=True)
    got = []
    for _ in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        got.append(int(token))
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    assert got == want


def _visual(family: Family, inputs: Inputs) -> Inputs:
    names = {name for group in family.pixels.values() for name in group}
    return {name: value for name, value in inputs.items() if name in names}


def _conversation(model: Any, ids: torch.Tensor, like: Inputs) -> Inputs:
    # An answer may hold the id of padding; only a mask says that it is none.
    made: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in like:
        made["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if "token_type_ids" in like:
        made["token_type_ids"] = (ids == model.config.image_token_id).long()
    return made


def joined_pixels(first: Inputs, second: Inputs) -> Inputs:
    ids = {"input_ids": torch.tensor([[1]])}
    both = joined([{**ids, **part} for part in (first, second)])
    return {name: both[name] for name in {*first, *second}}


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_remove_copies_and_folders(family: Family, models: Any, tmp_path: Path) -> None:
    model, row = models(family), _rows(family)["one"]
    before, want = dict(model.__dict__), model(**row).logits
    names = set(model.state_dict())
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    pruned = model(**row).logits
    clone = copy.deepcopy(model)
    assert torch.equal(clone(**row).logits, pruned)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text() + str(sorted(tmp_path.iterdir()))
    assert "ocvtp" not in config.replace(str(tmp_path), "")
    ocvtp.remove(model)
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(model(**row).logits, want)
    assert torch.equal(clone(**row).logits, pruned)  # the copy keeps its own patch
    other = family.model()
    assert "forward" not in other.__dict__


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("rule", ["attention", "random", "grid", "farthest_point", "greedy_dpp"])
def test_rules_without_training(family: Family, models: Any, rule: str) -> None:
    model, rows = models(family), list(_rows(family).values())
    report = ocvtp.apply(model, rule, keep=family.keep, **PLAIN)
    compares = rule in ("farthest_point", "greedy_dpp")
    consumed = max(report.consumed_layers) if compares else None
    assert (report.selector, report.read_layer) == (rule, consumed)
    assert rule in str(report)
    batch = family.batch()
    width = batch["input_ids"].shape[1]
    out = steps(model, batch)
    assert_rows_answer_alike(out, width, [steps(model, row) for row in rows], rows)
    with pytest.raises(ValueError, match="coverage"):
        ocvtp.apply(model, rule, keep="auto", max_error=0.5, budgets=[2, 3], **PLAIN)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_budgets(family: Family, models: Any) -> None:
    """Shares, more than there are, and as few as cover an image well enough."""
    model, row, pruner = models(family), _rows(family)["one"], family.pruner()
    long = model(**row).logits
    lengths = []
    for keep in (0.1, 0.3, 0.6, 1.0):
        ocvtp.apply(model, pruner, keep=keep)
        lengths.append(model(**row).logits.shape[1])
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == long.shape[1]
    fixed = ocvtp.apply(model, pruner, keep=2).tokens_before is not None
    if fixed:
        with pytest.raises(ValueError, match="keep"):
            ocvtp.apply(model, pruner, keep=10_000)
    else:
        ocvtp.apply(model, pruner, keep=10_000)
        assert torch.equal(model(**row).logits, long)
    budgets = [2, family.keep + 2, family.keep + 6]
    adapter = adapter_for(model)
    if NATIVE_ROUTE == "mm_encoder_outputs" and getattr(adapter, "stacked", False):
        with pytest.raises(ValueError, match="it stacks them"):
            ocvtp.apply(model, pruner, keep="auto", max_error=0.5, budgets=budgets)
        return
    found = set()
    for limit in (0.0, 10.0):
        ocvtp.apply(model, pruner, keep="auto", max_error=limit, budgets=budgets)
        with pytest.warns(UserWarning, match="miss") if limit == 0.0 else _nothing():
            got = model(**row).logits
        ocvtp.apply(model, pruner, keep=budgets[-1] if limit == 0.0 else budgets[0])
        assert torch.equal(got, model(**row).logits)
        found.add(got.shape[1])
    assert len(found) == 2
    rows = list(_rows(family).values())
    ocvtp.apply(model, pruner, keep="auto", max_error=0.6, budgets=budgets)
    batch = family.batch()
    out = steps(model, batch)
    width = batch["input_ids"].shape[1]
    assert_rows_answer_alike(out, width, [steps(model, row) for row in rows], rows)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("family", CASES)
def test_what_does_not_fit_is_refused(family: Family, models: Any) -> None:
    model, row = models(family), _rows(family)["two"]
    training = r"ocvtp features .* --layer \d+ .*ocvtp train"
    with pytest.raises(ValueError, match=rf"width {family.width + 8}, .*{training}"):
        ocvtp.apply(model, family.pruner(in_dim=family.width + 8), keep=2)
    with pytest.raises(ValueError, match=rf"tokens of 7 x 7 patches, .*{training}"):
        ocvtp.apply(model, family.pruner(unit=7), keep=2)
    with pytest.raises(ValueError, match="layer 40, which must not be beyond"):
        ocvtp.apply(model, family.pruner(layer=40), keep=2)
    with pytest.raises(TypeError, match="one of"):
        ocvtp.apply(model, "entropy", keep=2)  # type: ignore[arg-type]
    for name in ("layout", "newlines", "frames", "tower"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            ocvtp.apply(model, family.pruner(), keep=2, **{name: "sideways"})
    assert "forward" not in model.__dict__
    ocvtp.apply(model, family.pruner(), keep=2)
    cut = {**row, "input_ids": row["input_ids"][:, :-4]}
    cut["input_ids"] = torch.cat([cut["input_ids"], cut["input_ids"][:, 3:6]], dim=1)
    if "mm_token_type_ids" in row:
        cut["mm_token_type_ids"] = torch.zeros_like(cut["input_ids"])
    if "token_type_ids" in row:
        cut["token_type_ids"] = torch.zeros_like(cut["input_ids"])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="placeholders per row"):
            call(**cut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_half_precision(family: Family, dtype: torch.dtype) -> None:
    model = family.model().to(dtype)
    batch = {
        name: value.to(dtype) if value.is_floating_point() and "pixel" in name else value
        for name, value in family.batch().items()
    }
    live = batch["attention_mask"].bool()
    want = model(**batch).logits[live]
    ocvtp.apply(model, family.pruner(), keep=1.0)
    assert torch.equal(model(**batch).logits[live], want)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    assert torch.isfinite(model(**batch).logits).all()
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + NEW


@pytest.mark.parametrize("family", CASES)
def test_training_after_inference_mode(family: Family) -> None:
    """Nothing that was made under inference mode is kept for later."""
    for cached in (packing.packing, packing.whole_picture, squares.members, qwen_geometry.geometry):
        cached.cache_clear()
    model, row = family.model(), dict(_rows(family)["two"])
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    with torch.inference_mode():
        model.generate(**row, **GREEDY)
    row["labels"] = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
    model(**row).loss.backward()


@pytest.mark.parametrize("family", CASES)
def test_gradient_checkpointing(family: Family) -> None:
    row = dict(_rows(family)["two"])
    row["labels"] = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
    grads = []
    for checkpointing in (False, True):
        model = family.model().train()
        ocvtp.apply(model, family.pruner(), keep=family.keep)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**row).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_the_route_is_the_one_this_transformers_has() -> None:
    report = ocvtp.apply(families()[0].model(), families()[0].pruner(), keep=2)
    assert report.route == NATIVE_ROUTE
    assert PAD == 0
