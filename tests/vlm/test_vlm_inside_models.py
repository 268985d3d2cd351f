"""Dropping tokens inside the language model of whole models: what must hold for every method."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from bench.rivals.in_llm import check
from ocvtp.methods.in_llm import Dart, FastV, Method, PyramidDrop, SparseVLM
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.in_llm import hooks_of, install, uninstall
from tests.vlm.skips import VERSION
from tests.vlm.tiny_inside import (
    DEPTH,
    GREEDY,
    IMAGE,
    METHODS,
    MODELS,
    TOKENS,
    WHOLE,
    batch,
    forced,
    four,
    llava,
    new,
    qwen3_vl,
    row,
)

DATA = Path(__file__).parents[1] / "data" / "rivals_llm"
STEPS = torch.randint(2, 110, (4, 3), generator=torch.Generator().manual_seed(8))
#: Qwen2.5-VL's own ``forward`` counts padding there, so that a batch differs from singles unpatched as well.
COUNTS_PADDING = VERSION.release < (5, 1)

families = pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
methods = pytest.mark.parametrize("name", METHODS)


@functools.cache
def _made(family: str) -> Any:
    return MODELS[family]()


@pytest.fixture
def model(family: str) -> Iterator[Any]:
    made = _made(family)
    yield made
    uninstall(made)


def on(family: str, method: Method) -> Method:
    """The method, cutting behind Qwen3-VL's DeepStack layers."""
    if family != "qwen3_vl":
        return method
    if isinstance(method, FastV | Dart):
        return dataclasses.replace(method, layer=2)
    return dataclasses.replace(method, layers=(2, 3, 5) if isinstance(method, PyramidDrop) else (1, 2, 4))


@pytest.mark.parametrize("name", ["fastv_a", "sparsevlm1_b", "pdrop_b", "dart_b"])
def test_every_step_is_the_official_codes(name: str) -> None:
    found = check(DATA / f"{name}.safetensors")
    assert len(found) > 6
    assert [one for one in found if not one.ok] == []


@families
@pytest.mark.parametrize("name", WHOLE)
def test_nothing_dropped_are_the_same_bits(family: str, name: str, model: Any) -> None:
    whole = batch(four(family))
    plain = forced(model, whole, STEPS)
    install(model, on(family, WHOLE[name]))
    assert torch.equal(forced(model, whole, STEPS), plain)


@families
@methods
def test_a_padded_batch_equals_its_rows(family: str, name: str, model: Any) -> None:
    rows = four(family)
    whole = batch(rows)
    plain = forced(model, whole, STEPS)
    install(model, on(family, METHODS[name]))
    found = forced(model, whole, STEPS)
    assert not torch.allclose(found[0], plain[0], atol=1e-2)
    assert torch.equal(found[2], plain[2]) or torch.allclose(found[2], plain[2], atol=1e-5)  # text alone
    if not (COUNTS_PADDING and family.startswith("qwen")):
        alone = [forced(model, batch([one]), STEPS[i : i + 1]) for i, one in enumerate(rows)]
        assert torch.allclose(found, torch.cat(alone), atol=1e-4)
    uninstall(model)
    assert torch.equal(forced(model, whole, STEPS), plain)


@families
@methods
def test_generate_of_a_batch_is_that_of_its_rows(family: str, name: str, model: Any) -> None:
    rows = four(family)
    whole = batch(rows)
    install(model, on(family, METHODS[name]))
    for more in ({}, {"num_beams": 3}):
        alone = [new(model.generate(**batch([one]), **GREEDY, **more), batch([one])) for one in rows]
        assert torch.equal(new(model.generate(**whole, **GREEDY, **more), whole), torch.cat(alone))
    greedy = new(model.generate(**whole, **GREEDY), whole)
    static = model.generate(**whole, **GREEDY, cache_implementation="static")
    assert torch.equal(new(static, whole), greedy)
    # Older transformers mix up the images of a prompt that has several and is repeated.
    few = batch(rows[:3])
    sampled = model.generate(**few, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(new(sampled, few), greedy[:3].repeat_interleave(2, 0))


@methods
def test_eager_attention_chooses_the_same(name: str) -> None:
    whole = batch(four("llava"))
    found = []
    for attention in ("sdpa", "eager"):
        model = llava(attention)
        install(model, METHODS[name])
        found.append(forced(model, whole, STEPS))
    assert torch.allclose(found[0], found[1], atol=1e-4)


@methods
def test_a_right_padded_prompt_equals_its_rows(name: str) -> None:
    model, rows = _made("llava"), four("llava")
    hooks = install(model, METHODS[name])
    try:
        hooks.seen = []
        right = model(**batch(rows, "right"), use_cache=True).logits
        stage = hooks.seen[-1].stage
        assert stage is not None
        last = stage.live.sum(1) - 1
        alone = torch.cat([model(**batch([one])).logits[:, -1] for one in rows])
    finally:
        uninstall(model)
    assert torch.allclose(right[torch.arange(4), last], alone, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ["fastv", "sparsevlm2", "dart"])
def test_dropping_is_masking(family: str, name: str, model: Any) -> None:
    inputs = batch([row(family, 2, 5, images=2, seed=4)])
    hooks = install(model, METHODS[name])
    hooks.seen = []
    dropped = model(**inputs, use_cache=True).logits[:, -1]
    stages = [one.stage for one in hooks.seen]
    uninstall(model)
    length = inputs["input_ids"].shape[1]
    handles = []
    for stage, end in zip(stages, [*(one.cut for one in stages[1:]), DEPTH], strict=True):
        seen = torch.zeros(length, dtype=torch.bool)
        seen[stage.columns[0]] = True
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (seen | torch.eye(length).bool())
        for layer in model.model.language_model.layers[stage.cut : end]:
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, given, mask=mask: (args, {**given, "attention_mask": mask[None, None]}),
                    with_kwargs=True,
                )
            )
    masked = model(**inputs, use_cache=True).logits[:, -1]
    for handle in handles:
        handle.remove()
    assert torch.allclose(dropped, masked, atol=1e-4)


@methods
def test_prompts_that_end_in_an_image(name: str) -> None:
    """No text can rate or be a pivot, where other rows have some; one token of text can't rate."""
    model, rows = _made("llava"), [row("llava", 6, n, seed=n) for n in (0, 1, 5)]
    install(model, METHODS[name])
    try:
        found = forced(model, batch(rows), STEPS[:3])
        alone = [forced(model, batch([one]), STEPS[i : i + 1]) for i, one in enumerate(rows)]
    finally:
        uninstall(model)
    assert torch.allclose(found, torch.cat(alone), atol=1e-4)


@methods
def test_layers_hold_what_is_left(name: str) -> None:
    model, method = _made("llava"), METHODS[name]
    inputs = batch([row("llava", 3, 9, images=2, seed=1)])
    install(model, method)
    try:
        cache = model(**inputs, use_cache=True).past_key_values
    finally:
        uninstall(model)
    held = [cache.get_seq_length(layer) for layer in range(DEPTH)]
    present, text = 2 * TOKENS, inputs["input_ids"].shape[1] - 2 * TOKENS
    for layer in range(DEPTH):
        if layer in method.cuts:
            present = sum(method.left(method.cuts.index(layer), present, 2 * TOKENS))
        assert held[layer] == present + text
    assert held[0] > held[-1]


@methods
def test_a_later_turn_goes_on_with_the_cache(name: str) -> None:
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    install(model, METHODS[name])
    try:
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        more = torch.randint(2, 110, (1, 5), generator=torch.Generator().manual_seed(1))
        turn = torch.cat([first.sequences, more], dim=1)
        kept = copy.deepcopy(first.past_key_values)  # a copy goes on as well
        second = model.generate(
            turn, attention_mask=torch.ones_like(turn), past_key_values=first.past_key_values, **GREEDY
        )
        ids, seen, found = turn[:, kept.get_seq_length() :], kept.get_seq_length(), []
        for _ in range(GREEDY["max_new_tokens"]):
            positions = torch.arange(seen, seen + ids.shape[1])[None]
            mask = torch.ones(1, seen + ids.shape[1], dtype=torch.long)
            out = model(input_ids=ids, attention_mask=mask, past_key_values=kept, position_ids=positions)
            seen += ids.shape[1]
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
    finally:
        uninstall(model)
    assert torch.equal(second[:, turn.shape[1] :], torch.cat(found, 1))


def test_a_static_cache_is_used_again_for_a_text() -> None:
    model = _made("llava")
    image, text = batch([row("llava", 3, 9, seed=1)]), batch([row("llava", 20, 4, images=0, seed=2)])
    plain = model.generate(**text, **GREEDY)
    install(model, METHODS["pyramiddrop"])
    try:
        for inputs in (image, text, image):
            static = model.generate(**inputs, **GREEDY, cache_implementation="static")
            assert torch.equal(static, model.generate(**inputs, **GREEDY))
        assert torch.equal(model.generate(**text, **GREEDY, cache_implementation="static"), plain)
    finally:
        uninstall(model)


def test_an_image_behind_a_used_cache_is_refused() -> None:
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    install(model, METHODS["fastv"])
    try:
        cache = model(**inputs, use_cache=True).past_key_values
        length = 2 * inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match="an image behind a cache"):
            model(**{**inputs, "attention_mask": torch.ones(1, length).long()}, past_key_values=cache)
    finally:
        uninstall(model)


def test_a_cache_cropped_by_lengths_is_refused() -> None:
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    install(model, METHODS["fastv"])
    try:
        cache = model(**inputs, use_cache=True).past_key_values
        cache.layers[0].keys = cache.layers[0].keys[:, :, :20]  # as an absolute length does to long layers
        cache.layers[0].values = cache.layers[0].values[:, :, :20]
        with pytest.raises(ValueError, match="its layers don't share"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    finally:
        uninstall(model)


def test_a_mask_of_the_callers_own_is_refused() -> None:
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    length = inputs["input_ids"].shape[1]
    own = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    install(model, METHODS["fastv"])
    try:
        with pytest.raises(ValueError, match="2-D attention_mask"):
            model(**{**inputs, "attention_mask": own})
    finally:
        uninstall(model)


def test_gradients_go_through_a_cut_but_not_through_checkpoints() -> None:
    model = llava()
    inputs = batch([row("llava", 3, 9, seed=1)])
    install(model, METHODS["sparsevlm"])
    model(**inputs).logits[:, -1].sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**inputs)


def test_a_copy_has_hooks_of_its_own() -> None:
    model = llava()
    inputs = batch([row("llava", 3, 9, seed=1)])
    plain = model(**inputs).logits
    install(model, METHODS["fastv"])
    short = model(**inputs).logits
    twin = copy.deepcopy(model)
    uninstall(model)
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(twin(**inputs).logits, short)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**inputs).logits, short)
    uninstall(twin)
    assert twin(**inputs).logits.shape == plain.shape
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_a_copy_of_a_part_does_nothing() -> None:
    model = llava()
    inputs = batch([row("llava", 3, 9, seed=1)])
    plain = model.model(**inputs).last_hidden_state
    install(model, METHODS["fastv"])
    part = copy.deepcopy(model.model)
    assert torch.equal(part(**inputs).last_hidden_state, plain)
    with pytest.raises(pickle.PicklingError, match="take them off"):
        pickle.dumps(model)


def test_one_method_at_a_time() -> None:
    model = _made("llava")
    install(model, METHODS["fastv"])
    with pytest.raises(PatchError, match="FastV"):
        install(model, METHODS["dart"])
    uninstall(model)
    uninstall(model)
    assert hooks_of(model) is None


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (FastV(DEPTH + 1, 4), "the language model has 6"),
        (SparseVLM((1, 2, 4), (10, 7, 4), 2), "14 heads"),
    ],
)
def test_what_does_not_fit_is_refused(method: Method, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        install(_made("llava"), method)
    assert hooks_of(_made("llava")) is None


def test_deepstack_layers_and_three_dimensions_are_respected() -> None:
    model = qwen3_vl()
    with pytest.raises(ValueError, match="cut before layer 2 or later"):
        install(model, FastV(1, 4))
    with pytest.raises(ValueError, match="three dimensions"):
        install(model, PyramidDrop((2, 3, 5), (0.6, 0.3, 0.1), "renumbered"))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_windows_and_prefixes_are_refused(family: str) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    if family == "mistral":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
        config = MistralConfig(**sizes, num_key_value_heads=1, num_hidden_layers=3, sliding_window=8)
        with pytest.raises(ValueError, match="window"):
            install(MistralForCausalLM(config), FastV(2, 4))
    else:
        model = llava()
        model.config.model_type = "gemma3"
        with pytest.raises(ValueError, match="gemma3"):
            install(model, FastV(2, 4))


def test_a_cut_behind_the_last_layer() -> None:
    """SparseVLM makes one in models of 16 layers: states get fewer, caches don't."""
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    plain = model(**inputs).logits
    method = SparseVLM((1, DEPTH - 1), (16, 4), 2, heads=2)
    install(model, method)
    try:
        out = model(**inputs, use_cache=True)
    finally:
        uninstall(model)
    assert out.logits.shape[1] == plain.shape[1] - TOKENS + 4
    assert out.past_key_values.get_seq_length(DEPTH - 1) == plain.shape[1] - 1


def test_no_cache_and_a_cache_of_the_callers_are_the_same() -> None:
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    install(model, METHODS["pyramiddrop"])
    try:
        found = [
            model(**inputs, use_cache=False).logits,
            model(**inputs, use_cache=True).logits,
            model(**inputs, past_key_values=DynamicCache()).logits,
        ]
    finally:
        uninstall(model)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_placeholders_that_the_model_says_itself_are_words() -> None:
    model = _made("llava")
    inputs = batch([row("llava", 3, 9, seed=1)])
    install(model, METHODS["fastv"])
    try:
        cache = model(**inputs, use_cache=True).past_key_values
        out = model(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache)
    finally:
        uninstall(model)
    assert out.logits.shape[1] == 1
