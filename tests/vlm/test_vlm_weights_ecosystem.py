"""Weights beside training, PEFT, torch.compile, copies and threads; and nothing of them when they go."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.call.weighing import attentions_of, hold_weights
from tests.vlm.family import Inputs, assert_rows_answer_alike, by_name, packed, steps
from tests.vlm.test_vlm_concurrency import At, Kind, at_once
from tests.vlm.test_vlm_ecosystem import with_lora
from tests.vlm.tiny_llava import GREEDY, KEEP, MERGED, ONE, TWO, WEIGHED, llava, mixed, pixels, prompt


@pytest.fixture
def weighed(model: Any, oc_pruner: Any) -> Any:
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    return model


@pytest.fixture
def one() -> Inputs:
    return prompt(ONE, pixels(1))


def hooks(model: Any) -> list[int]:
    """How many each attention module has."""
    found = attentions_of(model)
    assert all(
        set(module._forward_pre_hooks) >= set(module._forward_pre_hooks_with_kwargs) for module in found
    )
    return [len(module._forward_pre_hooks) for module in found]


def labelled(row: Inputs) -> Inputs:
    return {**row, "labels": torch.where(row["input_ids"] >= 100, -100, row["input_ids"])}


# --------------------------------------------------------------------------------------------------- training


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*checkpoint")
@pytest.mark.parametrize("removed", [False, True], ids=["patched", "removed before backward"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_gradient_checkpointing(name: str, reentrant: bool, removed: bool) -> None:
    """What the backward pass computes again has the weights that it had, whatever became of the patch."""
    family = by_name(name)
    row = labelled(family.rows()["two"])
    found = []
    for checkpointing in (False, True):
        model = family.model().train()
        ocvtp.apply(model, family.pruner(), keep=family.keep, **WEIGHED)
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        loss = model(**row).loss
        if removed:
            ocvtp.remove(model)
        found.append(gradients(model, loss))
        if removed:
            del loss
            gc.collect()
            assert not any(hooks(model))
    assert found[0].keys() == found[1].keys()
    largest = max(float(grad.abs().max()) for grad in found[0].values())
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, atol=1e-5 * largest, rtol=1e-3)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@torch.no_grad()
def test_packed_documents(name: str, models: Any) -> None:
    family = by_name(name)
    model, rows = models(family), family.rows()
    ocvtp.apply(model, family.pruner(), keep=family.keep, **WEIGHED)
    documents = [rows["two"], rows["text"], rows["one"]]
    alone = torch.cat([model(**document, use_cache=False).logits[0] for document in documents])
    together = model(**packed(family, model, [documents]), use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    ocvtp.apply(model, family.pruner(), keep=family.keep, **MERGED)
    other = model(**packed(family, model, [documents]), use_cache=False).logits[0]
    assert (other - together).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["cast", "autocast"])
@torch.no_grad()
def test_half_precision(way: str, attention: str, dtype: torch.dtype, oc_pruner: Any) -> None:
    """In a padded batch, whose padding sees nothing: a weight is no reason for what is no number."""
    model = llava(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.5)
    ocvtp.apply(model, "grid", keep=KEEP, **WEIGHED)
    batch, _ = mixed()
    want = model(**batch).logits[:, -1]
    ocvtp.apply(model, "grid", keep=KEEP, **MERGED)
    unweighed = float((model(**batch).logits[:, -1] - want).abs().max())
    if way == "cast":
        model.to(dtype)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    ocvtp.apply(model, "grid", keep=KEEP, **WEIGHED)
    with torch.autocast("cpu", dtype=dtype, enabled=way == "autocast"):
        got = model(**batch).logits
        assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 6
    assert torch.isfinite(got).all()
    assert float((got[:, -1].float() - want).abs().max()) < 0.5 * unweighed


def test_lora(oc_pruner: Any) -> None:
    batch, rows = mixed()
    merged = with_lora(llava()).merge_and_unload()
    ocvtp.apply(merged, oc_pruner, keep=KEEP, **WEIGHED)
    with torch.no_grad():
        want = merged(**batch).logits
    wrapped = with_lora(llava())
    ocvtp.apply(wrapped, oc_pruner, keep=KEEP, **WEIGHED)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**batch).logits, want, atol=1e-3, rtol=1e-3)
    width = batch["input_ids"].shape[1]
    assert_rows_answer_alike(steps(wrapped, batch), width, [steps(wrapped, row) for row in rows], rows)
    wrapped.train()
    gradients(wrapped, wrapped(**labelled(rows[1])).loss)
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("language_model" in name and "k_proj.lora_A" in name for name in trained)
    ocvtp.remove(wrapped)
    assert not any(hooks(wrapped.get_base_model()))


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compiled and run first", "applied first"])
@torch.no_grad()
def test_a_compiled_language_model(order: str, oc_pruner: Any, one: Inputs) -> None:
    """In one graph a call. What was compiled without weights is compiled again for them."""
    asked: Inputs = {"do_sample": False, "max_new_tokens": 3}
    want_model = llava()
    unpruned = want_model(**one).logits
    ocvtp.apply(want_model, oc_pruner, keep=KEEP, **WEIGHED)
    want = want_model(**one).logits, want_model.generate(**one, **asked)
    torch._dynamo.reset()
    model = llava()
    if order == "applied first":
        ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    inner = torch.compile(model.model.language_model, backend="eager", fullgraph=True)
    model.model.language_model = inner
    if order == "compiled and run first":
        model(**one)
        ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    torch.testing.assert_close(model(**one).logits, want[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**one, **asked), want[1])
    ocvtp.remove(model)
    gc.collect()  # the compiler leaves a call's arguments to it
    assert not any(hooks(model))
    torch.testing.assert_close(model(**one).logits, unpruned, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_hooks_stay_while_something_compiles(model: Any, oc_pruner: Any, one: Inputs) -> None:
    """Garbage collection ends the last call in the middle of it; the guards that follow name the hooks."""
    want = model(**one).logits
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    held = [hold_weights(controller_of(model))]
    ocvtp.remove(model)
    assert hooks(model) == [1, 1]
    torch._dynamo.reset()
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        held.clear()
        gc.collect()
        seen.append(hooks(model))
        return graph.forward

    compiled = torch.compile(model.forward, backend=backend)
    torch.testing.assert_close(compiled(**one).logits, want, atol=1e-5, rtol=1e-5)
    assert seen[0] == [1, 1]
    torch._dynamo.reset()
    gc.collect()
    assert hooks(model) == [0, 0]


# ---------------------------------------------------------------------------------------- copies, on and off


@torch.no_grad()
def test_remove_leaves_nothing(model: Any, oc_pruner: Any, one: Inputs, tmp_path: Path) -> None:
    before, names = model(**one).logits, set(model.state_dict())
    modules = {name: set(module.__dict__) for name, module in model.named_modules()}
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    assert hooks(model) == [1, 1]
    ocvtp.apply(model, oc_pruner, keep=KEEP + 1, **WEIGHED)
    assert hooks(model) == [1, 1]
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert torch.equal(saved(**one).logits, before)
    assert "ocvtp" not in (tmp_path / "config.json").read_text().replace(str(tmp_path), "")
    for static in ({}, {"cache_implementation": "static", "disable_compile": True}):
        model.generate(**one, **GREEDY, **static)
    model(**labelled(one))
    ocvtp.remove(model)
    assert hooks(model) == [0, 0]
    assert torch.equal(model(**one).logits, before)
    left = {name: set(module.__dict__) - modules[name] for name, module in model.named_modules()}
    left[""] -= {"_cache", "_previous_max_cache_length"}  # transformers' own static cache
    assert not any(left.values())


def test_others_hooks_stay(weighed: Any, one: Inputs) -> None:
    seen: list[str] = []
    module = attentions_of(weighed)[0]
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.extend(kwargs), with_kwargs=True)
    weighed.generate(**one, **GREEDY)
    assert "attention_mask" in seen
    assert not any("ocvtp" in name for name in seen)
    ocvtp.remove(weighed)
    assert hooks(weighed) == [1, 0]


def test_copies(weighed: Any, one: Inputs) -> None:
    want = weighed.generate(**one, **GREEDY)
    clone = copy.deepcopy(weighed)
    ocvtp.remove(weighed)
    assert (hooks(weighed), hooks(clone)) == ([0, 0], [1, 1])
    assert torch.equal(clone.generate(**one, **GREEDY), want)
    unpruned = weighed.generate(**one, **GREEDY)
    ocvtp.remove(clone)
    assert hooks(clone) == [0, 0]
    assert torch.equal(clone.generate(**one, **GREEDY), unpruned)


@torch.no_grad()
def test_the_model_inside_is_copied_and_pickled(weighed: Any) -> None:
    """Alone it has nobody who weighs."""
    ids = torch.tensor([[1, 21, 22]])
    want = weighed.model.language_model(ids).last_hidden_state
    for twin in (copy.deepcopy(weighed.model), pickle.loads(pickle.dumps(weighed.model))):
        assert torch.equal(twin.language_model(ids).last_hidden_state, want)


def test_pruned_within_and_back(model: Any, oc_pruner: Any, one: Inputs) -> None:
    said = {}
    for key, options in (("plain", MERGED), ("weighed", WEIGHED)):
        ocvtp.apply(model, oc_pruner, keep=KEEP, **options)
        said[key] = steps(model, one).logits
    ocvtp.remove(model)
    said["unpruned"] = steps(model, one).logits

    def is_now(key: str) -> bool:
        assert hooks(model) == [int(key == "weighed")] * 2
        return all(torch.equal(a, b) for a, b in zip(steps(model, one).logits, said[key], strict=True))

    with ocvtp.pruned(model, oc_pruner, keep=KEEP, **WEIGHED):
        assert is_now("weighed")
        with ocvtp.pruned(model, oc_pruner, keep=KEEP, **MERGED):
            assert is_now("plain")
            with ocvtp.pruned(model, oc_pruner, keep=KEEP, **WEIGHED):
                assert is_now("weighed")
            assert is_now("plain")
        assert is_now("weighed")
    assert is_now("unpruned")
    ocvtp.apply(model, oc_pruner, keep=KEEP, **MERGED)
    with ocvtp.pruned(model, oc_pruner, keep=KEEP, **WEIGHED):
        assert is_now("weighed")
    assert is_now("plain")


# --------------------------------------------------------------------------------------------------- threads


def told(model: Any, inputs: Inputs, **more: Any) -> torch.Tensor:
    return torch.stack(steps(model, inputs, **more).logits)


def test_threads_of_two_models(oc_pruner: Any) -> None:
    """One with weights, one without, and a third that shares the second's language model."""
    models = [llava(), llava(seed=1), llava()]
    row = prompt(TWO, pixels(2))
    for model, options in zip(models, (WEIGHED, MERGED, WEIGHED), strict=True):
        ocvtp.apply(model, oc_pruner, keep=KEEP, **options)
    want = [told(model, row) for model in models]

    def work(model: Any) -> Callable[[], list[torch.Tensor]]:
        return lambda: [told(model, row) for _ in range(3)]

    got = at_once(*(work(model) for model in models))
    for answers, expected in zip(got, want, strict=True):
        assert all(torch.equal(answer, expected) for answer in answers)


@pytest.mark.parametrize("what", ["other settings", "remove", "remove and apply"])
@pytest.mark.parametrize("place", ["first tower layer", "projector", "prefill", "decode", "processor"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_a_running_answer_ends_as_it_began(place: str, what: str, options: Inputs, oc_pruner: Any) -> None:
    """Another thread turns weights off meanwhile: they stay to its end, and their hooks no longer."""
    kind, model, row = Kind("llava"), llava(), prompt(ONE, pixels(1))
    ocvtp.apply(model, oc_pruner, keep=KEEP, **MERGED)
    plain = told(model, row)
    ocvtp.remove(model)
    unpruned = told(model, row)
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    want = told(model, row, **options)

    def change() -> None:
        if what.startswith("remove"):
            ocvtp.remove(model)
        if what != "remove":
            ocvtp.apply(model, oc_pruner, keep=KEEP, **MERGED)

    with At(model, kind, place, lambda: at_once(change) and None) as more:
        got = told(model, row, **options, **more)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not any(hooks(model))
    assert torch.equal(told(model, row), unpruned if what == "remove" else plain)
