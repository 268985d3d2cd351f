"""Weights belong to what a cache holds: conversations that go on with it, and those that can't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import ocvtp
from tests.vlm.family import Inputs, by_name, steps
from tests.vlm.skips import NATIVE_ROUTE, needs_images_behind_cache, needs_mm_route
from tests.vlm.tiny_llava import (
    GREEDY,
    IMAGE,
    KEEP,
    MERGED,
    NONE,
    ONE,
    TOKENS,
    WEIGHED,
    llava,
    mixed,
    pixels,
    prompt,
)

NEW = GREEDY["max_new_tokens"]
FOLLOW_UP = [40, 41, 42]
SECOND = [43, *[IMAGE] * TOKENS, 44, 45]


def extended(sequences: torch.Tensor, text: list[int]) -> torch.Tensor:
    return torch.cat([sequences, torch.tensor([text]).expand(len(sequences), -1)], dim=1)


def assert_alike(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["returned", "own", "static"])
def test_turns_are_one_long_prompt(weighed: Any, kind: str) -> None:
    """Text, then a picture, each behind what was said."""
    needs_images_behind_cache()
    images = pixels(2)
    config = weighed.config.get_text_config()
    cache = {"own": DynamicCache(), "static": StaticCache(config=config, max_cache_len=96)}.get(kind)
    more: Inputs = {"disable_compile": True} if kind == "static" else {}
    turn = steps(weighed, prompt(ONE, images[:1]), past_key_values=cache, **more)
    for text, new, so_far in ((FOLLOW_UP, None, 1), (SECOND, images[1:], 2)):
        ids = extended(turn.sequences, text)
        asked: Inputs = {"input_ids": ids} if new is None else {"input_ids": ids, "pixel_values": new}
        turn = steps(weighed, asked, past_key_values=turn.past_key_values, **more)
        assert_alike(turn, steps(weighed, {"input_ids": ids, "pixel_values": images[:so_far]}))


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "llava_next"])
def test_turns_of_other_families(name: str, models: Any) -> None:
    family = by_name(name)
    model, first = models(family), family.rows()["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep, **WEIGHED)
    turn = steps(model, first)
    ids = extended(turn.sequences, FOLLOW_UP)
    asked: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in first:
            asked[key] = (ids == model.config.image_token_id).to(first[key].dtype)
    beside = {key: first[key] for key in family.pixels["image"]}
    assert_alike(steps(model, asked, past_key_values=turn.past_key_values), steps(model, {**asked, **beside}))


@torch.no_grad()
def test_generate_then_forward_then_generate(weighed: Any) -> None:
    images = pixels(2)
    turn = steps(weighed, prompt(ONE, images[:1]))
    ids = extended(turn.sequences, SECOND)
    needs_images_behind_cache()
    rest = ids[:, turn.sequences.shape[1] - 1 :]  # the last new token is not in the cache yet
    got = weighed(input_ids=rest, pixel_values=images[1:], past_key_values=turn.past_key_values)
    want = weighed(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(got.logits[:, -2:], want[:, -2:], atol=1e-4, rtol=1e-4)
    longer = extended(ids, FOLLOW_UP)
    answer = steps(weighed, {"input_ids": longer}, past_key_values=got.past_key_values)
    assert_alike(answer, steps(weighed, {"input_ids": longer, "pixel_values": images}))


@pytest.mark.parametrize("way", ["forward", "around"])
@torch.no_grad()
def test_decoding_by_hand(weighed: Any, way: str) -> None:
    """A loop around ``forward``, or around the model inside."""
    batch, _ = mixed()
    want = weighed.generate(**batch, **GREEDY)[:, -NEW:]
    called = weighed
    if way == "around":
        needs_mm_route()
        inner = weighed.model

        def called(**given: Any) -> Any:
            out = inner(**given)
            out.logits = weighed.lm_head(out.last_hidden_state)
            return out

    out = called(**batch, use_cache=True)
    mask, tokens = batch["attention_mask"], []
    for _ in range(NEW):
        tokens.append(out.logits[:, -1:].argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        cache = out.past_key_values
        out = called(input_ids=tokens[-1], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert torch.equal(torch.cat(tokens, dim=1), want)


CHANGES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "dropped": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_rows_that_change_places_take_their_weights_along(weighed: Any, change: str) -> None:
    batch, _ = mixed()
    cache = weighed(**batch, use_cache=True).past_key_values
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
    new = torch.tensor([[40, 41, 42], [43, 44, 45], [46, 47, 48]])
    twin, (apply, rows) = copy.deepcopy(cache), CHANGES[change]
    apply(twin)
    want = weighed(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    got = weighed(input_ids=new[rows], attention_mask=mask[rows], past_key_values=twin).logits
    torch.testing.assert_close(got, want[rows], atol=1e-4, rtol=1e-4)


def test_cropped_copied_and_emptied(weighed: Any) -> None:
    row = prompt(ONE, pixels(1))
    turn = steps(weighed, row)
    cache = copy.deepcopy(turn.past_key_values)
    steps(weighed, {"input_ids": extended(turn.sequences, FOLLOW_UP)}, past_key_values=cache)
    cache.crop(turn.past_key_values.get_seq_length() - cache.get_seq_length())  # take the follow-up back
    other = extended(turn.sequences, [60, 61])
    want = steps(weighed, {**row, "input_ids": other})
    assert_alike(steps(weighed, {"input_ids": other}, past_key_values=cache), want)
    cache.crop(-cache.get_seq_length())
    text = prompt(NONE)
    assert_alike(steps(weighed, text, past_key_values=cache), steps(weighed, text))


@pytest.mark.parametrize("began", ["with", "without"])
@torch.no_grad()
def test_a_cache_is_not_continued_the_other_way(began: str, oc_pruner: Any) -> None:
    first, second = (WEIGHED, MERGED) if began == "with" else (MERGED, WEIGHED)
    model, row = llava(), prompt(ONE, pixels(1))
    ocvtp.apply(model, oc_pruner, keep=KEEP, **first)
    caches = [steps(model, row).past_key_values, model(**row, use_cache=True).past_key_values]
    want = [cache.get_seq_length() for cache in caches]
    ids = extended(steps(model, row).sequences, FOLLOW_UP)
    told = steps(model, {"input_ids": ids}, past_key_values=copy.deepcopy(caches[0]))
    ocvtp.apply(model, oc_pruner, keep=KEEP, **second)
    advice = rf"filled {began} weights .*weigh={began == 'with'}\), or start with an empty cache"
    for cache in caches:
        with pytest.raises(ValueError, match=advice):
            model(input_ids=ids[:, -3:], past_key_values=cache)
        with pytest.raises(ValueError, match=advice):
            model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    if NATIVE_ROUTE == "mm_encoder_outputs":
        with pytest.raises(ValueError, match=advice):
            model.model(input_ids=ids[:, -3:], past_key_values=caches[0])
    assert [cache.get_seq_length() for cache in caches] == want
    ocvtp.apply(model, oc_pruner, keep=KEEP, **first)  # as good as before
    assert_alike(steps(model, {"input_ids": ids}, past_key_values=caches[0]), told)


@torch.no_grad()
def test_a_cache_that_holds_no_pictures_is_anybodys(oc_pruner: Any) -> None:
    """Nothing in it stands for others, whoever filled it; nor in one of pictures that kept all."""
    needs_images_behind_cache()
    model, image = llava(), pixels(2)
    cache = DynamicCache()
    turn = steps(model, prompt(NONE), past_key_values=cache)
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    ids = extended(turn.sequences, SECOND)
    asked: Inputs = {"input_ids": ids, "pixel_values": image[:1]}
    assert_alike(steps(model, asked, past_key_values=cache), steps(model, asked))
    cache = DynamicCache()
    ocvtp.apply(model, oc_pruner, keep=1.0, **MERGED)
    turn = steps(model, prompt(ONE, image[:1]), past_key_values=cache)
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    ids = extended(turn.sequences, SECOND)
    out = steps(model, {"input_ids": ids, "pixel_values": image[1:]}, past_key_values=cache)
    ocvtp.apply(model, oc_pruner, keep=KEEP, **MERGED)
    with pytest.raises(ValueError, match="filled with weights"):
        steps(model, {"input_ids": extended(out.sequences, FOLLOW_UP)}, past_key_values=cache)


@torch.no_grad()
def test_nothing_of_a_call_stays_on_its_cache(weighed: Any) -> None:
    """A failed call's neither, and nothing on the static cache that the model keeps for itself."""
    row, static = prompt(ONE, pixels(1)), {"cache_implementation": "static", "disable_compile": True}
    want = weighed.generate(**row, **GREEDY)
    cache = DynamicCache()
    with pytest.raises(ZeroDivisionError):
        weighed.generate(**row, **GREEDY, past_key_values=cache, prefix_allowed_tokens_fn=lambda *_: [1 // 0])
    with pytest.raises(ZeroDivisionError):
        weighed.generate(**row, **GREEDY, **static, prefix_allowed_tokens_fn=lambda *_: [1 // 0])
    assert {name for name in vars(cache) if "ocvtp" in name} <= {"_ocvtp_note"}
    assert torch.equal(weighed.generate(**row, **GREEDY, **static), want)
    text = torch.tensor([[*NONE, *range(30, 60)]])
    told = weighed.generate(input_ids=text, **GREEDY, **static)
    ocvtp.remove(weighed)
    assert torch.equal(weighed.generate(input_ids=text, **GREEDY, **static), told)
    assert torch.equal(weighed.generate(input_ids=text, **GREEDY), told)
