"""Dropping tokens inside the language model beside threads, wrappers, and who takes it off meanwhile."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import LogitsProcessorList

import ocvtp
from ocvtp.vlm.in_llm import hooks_of
from tests.vlm.skips import VERSION
from tests.vlm.tiny_inside import GREEDY, METHODS, batch, forced, four, llava, new, ours_on, row

ONE = row("llava", 3, 9, seed=1)
STEPS = torch.randint(2, 110, (4, 3), generator=torch.Generator().manual_seed(8))
methods = pytest.mark.parametrize("name", METHODS)


class Removing:
    """A logits processor after whose second call the model is not patched."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2:
            ocvtp.remove(self.model)
            assert ours_on(self.model)
        return scores


@methods
@pytest.mark.parametrize("pruner", [None, "grid"])
def test_generate_ends_as_it_began(name: str, pruner: Any) -> None:
    model, inputs = llava(), batch([ONE])
    settings = {} if pruner is None else {"keep": 8}
    ocvtp.apply(model, pruner, **settings, inside=METHODS[name])
    wanted = model.generate(**inputs, **GREEDY)
    found = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([Removing(model)]))
    assert torch.equal(found, wanted)
    assert hooks_of(model) is None
    assert ours_on(model) == []


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, inputs = llava(), batch([ONE])
    ocvtp.apply(model, None, inside=METHODS["sparsevlm"])
    wanted = model(**inputs).logits
    layer = model.model.language_model.layers[4]
    with pytest.raises(RuntimeError, match="on purpose"), _failing(layer):
        model(**inputs)
    text = batch([row("llava", 9, 9, images=0)])
    assert model(**text).logits.shape[1] == text["input_ids"].shape[1]
    assert torch.equal(model(**inputs).logits, wanted)
    ocvtp.remove(model)
    assert ours_on(model) == []


@contextlib.contextmanager
def _failing(layer: Any) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.skipif(
    Version("5.10") > VERSION, reason="unpatched, its tower mixes up threads' features as well"
)
@methods
def test_threads_don_t_see_each_others_calls(name: str) -> None:
    model = llava()
    ocvtp.apply(model, None, inside=METHODS[name])
    inputs = [batch([one]) for one in four("llava")]
    wanted = [model.generate(**one, **GREEDY) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = list(pool.map(lambda one: model.generate(**one, **GREEDY), inputs))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    ocvtp.remove(model)
    assert ours_on(model) == []


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    model = llava()
    inputs = batch([ONE])
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    ).eval()
    plain = wrapped(**inputs).logits
    ocvtp.apply(wrapped, None, inside=METHODS["pyramiddrop"])
    short = wrapped(**inputs).logits
    assert short.shape[1] < plain.shape[1]
    merged = wrapped.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, short, atol=1e-3)
    ocvtp.remove(merged)


@methods
def test_weights_that_are_brought_when_called(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = llava(), batch([ONE])
    ocvtp.apply(model, None, inside=METHODS[name])
    wanted = model.generate(**inputs, **GREEDY)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


@methods
def test_half_precision_chooses_nearly_the_same(name: str) -> None:
    model, whole = llava(), batch(four("llava"))
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        ocvtp.apply(model, None, inside=METHODS[name])
        hooks = hooks_of(model)
        hooks.seen = []
        out = model.generate(**{**whole, "pixel_values": whole["pixel_values"].to(dtype)}, **GREEDY)
        assert out.shape[0] == 4
        kept.append(hooks.seen[0].choice.kept)
        ocvtp.remove(model)
    shared, total = int((kept[0] & kept[1]).sum()), int(kept[0].sum())
    assert shared > 0.7 * total


@pytest.mark.slow
def test_dynamo_traces_around_it() -> None:
    model, inputs = llava(), batch([ONE])
    ocvtp.apply(model, None, inside=METHODS["fastv"])
    wanted = forced(model, inputs, STEPS[:1, :1])
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(forced(compiled, inputs, STEPS[:1, :1]), wanted, atol=1e-4)
    torch._dynamo.reset()


def test_hidden_states_are_those_of_every_layer() -> None:
    model, inputs = llava(), batch([ONE])
    ocvtp.apply(model, None, inside=METHODS["fastv"])
    states = model(**inputs, output_hidden_states=True).hidden_states
    lengths = [state.shape[1] for state in states]
    assert lengths[0] == inputs["input_ids"].shape[1]
    assert lengths[-1] == lengths[0] - 10
    said = new(model.generate(**inputs, **GREEDY), inputs)
    assert said.shape == (1, 5)
