"""Who calls the model inside, around ``forward``, is served on the short sequence, or told what to do."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import ocvtp
from tests.vlm.family import Family, families
from tests.vlm.skips import NATIVE_ROUTE, needs_mm_route
from tests.vlm.tiny_llava import IMAGE, KEEP, ONE, TOKENS, mixed, pixels, prompt


@pytest.fixture
def one() -> dict[str, torch.Tensor]:
    return prompt(ONE, pixels(1))


def labels_of(inputs: dict[str, Any]) -> torch.Tensor:
    """Of the text, but for the first token of a row, which nothing comes before."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    labels = ids.masked_fill((ids >= 100) | (mask == 0), -100)
    return labels.masked_fill(mask.cumsum(1) <= 1, -100)


def fuse(model: Any) -> None:
    """As TRL's fused head does: a ``forward`` that goes around the one it pretends to be, if told to."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def fused(self: Any, *args: Any, fused_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_head:
            return original(*args, **kwargs)
        states = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        logits = self.get_output_embeddings()(states)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())

    model.forward = types.MethodType(fused, model)


def replaced(self: Any, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
    """As Liger does on an instance: a ``forward`` with a loss of its own."""
    out = self.model(input_ids=input_ids, **{**more, "return_dict": True})
    logits = self.lm_head(out.last_hidden_state)
    loss = None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1])
    return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in families()])
def test_a_fused_loss_is_the_pruned_one(family: Family) -> None:
    needs_mm_route()
    model, batch = family.model(), family.batch()
    labels = labels_of(batch)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model(**batch, labels=labels).loss if family.turns else None  # a prefix LM masks by its labels
    model.zero_grad()
    if want is not None:
        want.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fuse(model)
    loss = model(**batch, labels=labels, fused_head=True)
    if want is None:
        assert loss.isfinite()
        return
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_replaced_forward(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    needs_mm_route()
    batch, _ = mixed()
    labels = labels_of(batch)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    short, loss = model(**one), model(**batch, labels=labels).loss
    told = model.generate(**one, max_new_tokens=4, do_sample=False)
    model.forward = types.MethodType(replaced, model)
    torch.testing.assert_close(model(**batch, labels=labels).loss, loss, atol=1e-5, rtol=1e-5)
    out = model(**one)
    assert out.logits.shape[1] == len(ONE)
    torch.testing.assert_close(out.logits[:, -3:], short.logits[:, -3:])
    assert torch.equal(model.generate(**one, max_new_tokens=4, do_sample=False), told)
    with pytest.raises(ocvtp.PatchError, match=r"replaced by .*test_vlm_inner\.replaced,.*Take"):
        ocvtp.apply(model, oc_pruner, keep=KEEP)
    ocvtp.remove(model)
    assert model(**one).past_key_values.get_seq_length() == len(ONE)


@torch.no_grad()
def test_trl_itself(model: Any, oc_pruner: Any) -> None:
    needs_mm_route()
    trl = pytest.importorskip("trl.trainer.utils")
    if not hasattr(trl, "add_fused_lm_head"):
        pytest.skip("a TRL without the fused head")
    batch, _ = mixed()
    labels = labels_of(batch)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    want = model(**batch, labels=labels).loss
    trl.add_fused_lm_head(model)
    out = model(**batch, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.loss, want, atol=1e-5, rtol=1e-5)
    assert out.log_probs.shape[1] == labels.shape[1] - 1
    ocvtp.remove(model)
    assert model(**batch).logits.shape[1] == labels.shape[1]


@pytest.mark.parametrize("again", [False, True], ids=["off", "off and on"])
@torch.no_grad()
def test_the_patch_goes_while_a_call_is_under_way(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor], again: bool
) -> None:
    """As another thread may have it: the call still gets the states of the long sequence, and once."""
    needs_mm_route()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    want = model.model(**one).last_hidden_state

    def off(*_: Any) -> None:
        ocvtp.remove(model)
        if again:
            ocvtp.apply(model, oc_pruner, keep=KEEP)

    hook = model.get_decoder().register_forward_pre_hook(off)
    got = model.model(**one).last_hidden_state
    hook.remove()
    assert torch.equal(got, want)
    ocvtp.remove(model)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    assert not torch.equal(model.model(**one).last_hidden_state, want)


@torch.no_grad()
def test_states_of_every_column(model: Any, oc_pruner: Any) -> None:
    """A column gets the states of the last kept one at or before it; text columns their own."""
    needs_mm_route()
    batch, rows = mixed()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    for inputs in (batch, *rows):
        out = model.model(**inputs, output_hidden_states=True)
        assert out.last_hidden_state.shape[:2] == inputs["input_ids"].shape
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    kept = ocvtp.vlm.select(model, rows[0]["pixel_values"]).indices[0].tolist()
    want = model(**rows[0], output_hidden_states=True).hidden_states[-1][0]
    got = model.model(**rows[0]).last_hidden_state[0]
    start = ONE.index(IMAGE)
    stays = [i for i, token in enumerate(ONE) if token != IMAGE or i - start in kept]
    for column in range(len(ONE)):
        last = max(i for i, place in enumerate(stays) if place <= column)
        assert torch.equal(got[column], want[last])


@torch.no_grad()
def test_a_conversation_around_forward(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    needs_mm_route()
    more = torch.tensor([[40, 41, 42]])
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    caches = DynamicCache(), DynamicCache()
    model(**one, past_key_values=caches[0])
    want = model(input_ids=more, past_key_values=caches[0]).logits
    model.model(**one, past_key_values=caches[1])
    assert caches[1].get_seq_length() == len(ONE) - TOKENS + KEEP
    states = model.model(input_ids=more, past_key_values=caches[1]).last_hidden_state
    torch.testing.assert_close(model.lm_head(states), want)
    assert torch.equal(
        model(input_ids=more, past_key_values=caches[0]).logits,
        model(input_ids=more, past_key_values=caches[1]).logits,
    )


@torch.no_grad()
def test_nothing_stays_behind(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    needs_mm_route()
    want = model.model(**one).last_hidden_state
    features = model.get_image_features(one["pixel_values"], return_dict=True).pooler_output[0]
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert torch.equal(
        model.get_image_features(one["pixel_values"], return_dict=True).pooler_output[0], features
    )
    assert not torch.equal(model.model(**one).last_hidden_state, want)
    twin = copy.deepcopy(model)
    ocvtp.remove(model)
    assert torch.equal(model.model(**one).last_hidden_state, want)
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
    assert not torch.equal(twin.model(**one).last_hidden_state, want)
    twin.lm_head.weight.neg_()
    ocvtp.apply(twin, oc_pruner, keep=KEEP + 2)
    cache = twin.model(**one).past_key_values
    assert cache.get_seq_length() == len(ONE) - TOKENS + KEEP + 2
    ocvtp.remove(twin)
    assert torch.equal(twin.model(**one).last_hidden_state, want)


@torch.no_grad()
def test_the_inner_model_alone_is_not_patched(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    """A copy of it could not be unpatched."""
    want = model.model(**one).last_hidden_state
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    alone = copy.deepcopy(model.model)
    assert torch.equal(alone(**one).last_hidden_state, want)
    hook = pickle.loads(pickle.dumps(next(iter(model.model._forward_pre_hooks.values()))))
    assert hook(None, (), one) is None
    model.model = alone
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    if NATIVE_ROUTE == "mm_encoder_outputs":
        assert not torch.equal(model.model(**one).last_hidden_state, want)
    ocvtp.remove(model)
    assert torch.equal(model.model(**one).last_hidden_state, want)


@torch.no_grad()
def test_hooks_of_accelerate_taken_away_under_ours(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    """The class's own ``forward`` is back on the instance, over our heads: still nothing runs unpruned."""
    needs_mm_route()
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.ModelHook())
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    hooks.remove_hook_from_module(model)
    assert model(**one).past_key_values.get_seq_length() == len(ONE) - TOKENS + KEEP


def around(model: Any, **inputs: Any) -> Any:
    return model.model(**inputs)


def test_what_cannot_be_served_is_named(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor], route: str
) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    ids = one["input_ids"]
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids), "pixel_values": one["pixel_values"]}
    with pytest.raises(ocvtp.PatchError, match=r"test_vlm_inner\.around .*pass input_ids instead"):
        around(model, **embeds)
    if route == "inputs_embeds":
        with pytest.raises(ocvtp.PatchError, match=r"transformers >= 5\.18"):
            around(model, **one)
        fuse(model)
        with pytest.raises(ocvtp.PatchError, match=r"test_vlm_inner\..*fused, which replaced its"):
            model(**one, labels=ids, fused_head=True)
        assert model(**one).logits.shape[1] == len(ONE) - TOKENS + KEEP
        return
    with pytest.raises(ocvtp.PatchError, match=r"around .*return_dict=True"):
        around(model, **one, return_dict=False)
    with pytest.raises(ValueError, match="exactly one of"):  # upstream's own words
        around(model, pixel_values=one["pixel_values"])


@torch.no_grad()
def test_a_cache_that_a_failed_call_filled_is_refused(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    needs_mm_route()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    cache = DynamicCache()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the last layer")

    handle = model.model.language_model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the last layer"):
        model.model(**one, past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == len(ONE) - TOKENS + KEEP
    with pytest.raises(ValueError, match="a call that failed"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)


def test_arguments_are_bound_as_python_binds_them(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    needs_mm_route()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model.model(one["input_ids"], **one)
    with pytest.raises(TypeError, match="at most"):
        model.model(*[None] * 40, **one)


def test_router_logits_are_those_of_the_short_sequence(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    needs_mm_route()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    with pytest.raises(ocvtp.PatchError, match="output_router_logits=False"):
        model.model(**one, output_router_logits=True)
