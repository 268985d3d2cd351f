"""The patch together with PEFT, accelerate, torch.compile and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.call.weighing import Weights
from tests.vlm.processor import write_processor
from tests.vlm.skips import NATIVE_ROUTE
from tests.vlm.tiny_llava import GREEDY, IMAGE, KEEP, ONE, TOKENS, llava, mixed, pixels, prompt


@pytest.fixture
def one() -> dict[str, torch.Tensor]:
    return prompt(ONE, pixels(1))


# ------------------------------------------------------------------------------------------------ PEFT


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "linear_1"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero at first, which would test nothing
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@pytest.mark.parametrize("order", ["apply to PEFT model", "apply to base model first", "apply to base after"])
def test_peft(order: str, oc_pruner: Any) -> None:
    batch, _ = mixed()
    want_model = with_lora(llava())
    merged = want_model.merge_and_unload()
    ocvtp.apply(merged, oc_pruner, keep=KEEP)
    with torch.no_grad():
        want = merged(**batch).logits

    model = llava()
    if order == "apply to base model first":
        ocvtp.apply(model, oc_pruner, keep=KEEP)
    wrapped = with_lora(model)
    if order != "apply to base model first":
        ocvtp.apply(wrapped if order == "apply to PEFT model" else model, oc_pruner, keep=KEEP)
    with torch.no_grad():
        got = wrapped(**batch).logits
        # LoRA reaches tower, selection scores, projector and language model.
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(**batch).logits, want, atol=1e-2)
    out = wrapped.generate(**batch, **GREEDY)
    assert torch.equal(out, model.generate(**batch, **GREEDY))
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    wrapped.train()
    wrapped(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)).loss.backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("vision_tower" in n and "lora_A" in n for n in trained)
    assert any("language_model" in n and "lora_B" in n for n in trained)
    wrapped.eval()
    ocvtp.remove(wrapped)
    with torch.no_grad():
        assert wrapped(**batch).logits.shape[1] == batch["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------ accelerate


def offload(model: Any, kind: str, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    places = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "disk",
        "model.language_model": "cpu",
        "lm_head": "disk",
    }
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("kind", ["cpu_offload", "disk"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_weights(
    kind: str, when: str, model: Any, oc_pruner: Any, tmp_path: Path, route: str
) -> None:
    batch, _ = mixed()
    unpruned = model.generate(**batch, **GREEDY)
    with ocvtp.pruned(model, oc_pruner, keep=KEEP), torch.no_grad():
        want, seen = model.generate(**batch, **GREEDY), model(**batch).logits
    assert seen.shape[1] < batch["input_ids"].shape[1]  # the words may be the same: kept tokens stand for all
    if when == "after":
        ocvtp.apply(model, oc_pruner, keep=KEEP)
    offload(model, kind, tmp_path)
    if when == "before":
        ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert model.model.multi_modal_projector.linear_1.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, seen)
    assert torch.equal(model.generate(**batch, **GREEDY), want)
    ocvtp.remove(model)
    assert torch.equal(model.generate(**batch, **GREEDY), unpruned)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert torch.equal(model.generate(**batch, **GREEDY), want)
    assert "_hf_hook" in model.__dict__
    ocvtp.remove(model)
    with torch.no_grad():
        assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def test_hooks_taken_away_after_ours_was_switched_off(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    ocvtp.remove(model)
    hooks.remove_hook_from_module(model)
    with torch.no_grad():
        assert model(**one).logits.shape[1] == len(ONE)
    ocvtp.remove(model)
    assert "_ocvtp" not in model.__dict__
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    with torch.no_grad():
        assert model(**one).logits.shape[1] == len(ONE) - TOKENS + KEEP


def test_hooks_from_before_ours_taken_away(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    """accelerate restores the forward it had found, which throws our forward away, but not our generate."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.ModelHook())
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    hooks.remove_hook_from_module(model)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    with torch.no_grad():
        assert model(**one).logits.shape[1] == len(ONE) - TOKENS + KEEP
    ocvtp.remove(model)
    with torch.no_grad():
        assert model(**one).logits.shape[1] == len(ONE)


# --------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped module", "forward before", "forward after"])
def test_compiled_forward(how: str, model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        unpruned = model(**one).logits
        with ocvtp.pruned(model, oc_pruner, keep=KEEP):
            want = model(**one).logits
    torch._dynamo.reset()
    called = model
    if how == "wrapped module":
        called = torch.compile(model, backend="eager")
        ocvtp.apply(called, oc_pruner, keep=KEEP)
    elif how == "forward before":
        model.forward = torch.compile(model.forward, backend="eager")
        ocvtp.apply(model, oc_pruner, keep=KEEP)
    else:
        ocvtp.apply(model, oc_pruner, keep=KEEP)
        model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(called(**one).logits, want, atol=1e-5, rtol=1e-5)
        ocvtp.remove(called)
        torch.testing.assert_close(called(**one).logits, unpruned, atol=1e-5, rtol=1e-5)
        ocvtp.apply(called, oc_pruner, keep=KEEP)
        torch.testing.assert_close(called(**one).logits, want, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_a_decode_step_compiles_into_one_graph(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor], route: str
) -> None:
    from transformers import StaticCache

    ocvtp.apply(model, oc_pruner, keep=KEEP)
    want = model.generate(**one, **GREEDY)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    out = model(**one, past_key_values=cache, use_cache=True)
    length = out.logits.shape[1]
    note = cache.__dict__.pop("_ocvtp_note")  # as inside generate, which counts short columns
    cache._ocvtp_weights = Weights(note.bias, None)
    ids = one["input_ids"]
    for i in range(GREEDY["max_new_tokens"]):
        token = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        position = torch.tensor([[length + i]])
        out = step(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True)
    assert torch.equal(ids, want)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------- pipeline


def test_pipeline(model: Any, oc_pruner: Any, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor, pipeline

    write_processor(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.effect_noise((80, 64), 90).convert("RGB")
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    ask = {"images": image, "text": "w5 <image> w6 w7", "generate_kwargs": dict(GREEDY)}
    unpruned = pipe(**ask)[0]["generated_text"]
    ocvtp.apply(model, oc_pruner, keep=TOKENS)
    assert pipe(**ask)[0]["generated_text"] == unpruned
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    pruned = pipe(**ask)[0]["generated_text"]
    inputs = processor(images=image, text=ask["text"], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 3 + TOKENS
    out = model.generate(**inputs, **GREEDY)
    words = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).split()
    assert len(words) == GREEDY["max_new_tokens"]
    assert pruned.split()[-len(words) :] == words
    with torch.no_grad():  # the first words may be the same: kept tokens stand for all
        assert model(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]


def test_native_route_is_the_one_this_transformers_has(model: Any, oc_pruner: Any) -> None:
    assert ocvtp.apply(model, oc_pruner, keep=KEEP).route == NATIVE_ROUTE
