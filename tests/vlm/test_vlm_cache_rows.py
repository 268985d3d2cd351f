"""Rows of a kept cache that were reordered, doubled, dropped or repeated between turns."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    StaticCache,
)

import ocvtp
from ocvtp.vlm.call.memory import CacheNote, note_of, write_note
from ocvtp.vlm.call.prompt import identity
from tests.vlm.family import Family, Inputs, families, steps
from tests.vlm.tiny_llava import (
    GREEDY,
    IMAGE,
    KEEP,
    ONE,
    TOKENS,
    llava,
    mixed,
    pixels,
    prompt,
    pruner,
    sharpen,
    text_config,
    vision_config,
)

TALKING = [pytest.param(family, id=family.name) for family in families() if family.turns]
FOLLOW_UP = [40, 41, 42]

#: What is done to the cache of three rows, and which row is where afterwards.
CHANGES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "doubled": (lambda cache: cache.reorder_cache(torch.tensor([0, 0, 1])), [0, 0, 1]),
    "dropped": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "masked out": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, False])), [1]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "several times": (
        lambda cache: [
            cache.reorder_cache(torch.tensor([1, 2, 0])),
            cache.reorder_cache(torch.tensor([1, 2, 0])),
            cache.batch_select_indices(torch.tensor([1, 0])),
        ],
        [0, 2],
    ),
    "layer by layer": (
        lambda cache: [layer.reorder_cache(torch.tensor([2, 0, 1])) for layer in cache.layers],
        [2, 0, 1],
    ),
}


def gone_on(batch: Inputs, sequences: torch.Tensor, rows: list[int]) -> Inputs:
    """The next turn of these rows."""
    ids = torch.cat([sequences, torch.tensor([FOLLOW_UP] * len(sequences))], dim=1)[rows]
    old = batch["attention_mask"]
    asked: Inputs = {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(old, (0, ids.shape[1] - old.shape[1]), value=1)[rows],
    }
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in batch:
            asked[name] = (ids == IMAGE).to(batch[name].dtype)
    return asked


def assert_rows(got: Any, want: Any, rows: list[int]) -> None:
    assert torch.equal(got.sequences, want.sequences[rows])
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["reordered", "dropped", "repeated"])
@pytest.mark.parametrize("family", TALKING)
def test_generate_goes_on_with_other_rows(family: Family, models: Any, change: str) -> None:
    model, (apply, rows) = models(family), CHANGES[change]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    batch = family.batch(["one", "two", "text"])
    first = steps(model, batch)
    cache = copy.deepcopy(first.past_key_values)
    want = steps(model, gone_on(batch, first.sequences, [0, 1, 2]), past_key_values=first.past_key_values)
    apply(cache)
    got = steps(model, gone_on(batch, first.sequences, rows), past_key_values=cache)
    assert_rows(got, want, rows)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_forward_goes_on_with_other_rows(positions: str, route: str, change: str) -> None:
    model, (apply, rows) = llava(), CHANGES[change]
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    batch, _ = mixed()
    cache = model(**batch, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
    new = torch.tensor([[40, 41, 42], [43, 44, 45], [46, 47, 48]])
    want = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    apply(twin)
    got = model(input_ids=new[rows], attention_mask=mask[rows], past_key_values=twin)
    torch.testing.assert_close(got.logits, want[rows], atol=1e-4, rtol=1e-4)
    # And on, over the cache that this call left.
    if len(rows) == 3:
        apply(got.past_key_values)
        rows = [rows[row] for row in rows]
    mask, new = torch.nn.functional.pad(mask, (0, 1), value=1), torch.tensor([[50]] * 3)
    want = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    got = model(input_ids=new[rows], attention_mask=mask[rows], past_key_values=got.past_key_values)
    torch.testing.assert_close(got.logits, want[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["copied", "pickled", "cropped", "in inference mode"])
def test_what_else_happens_to_caches(positions: str, kind: str) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    batch, _ = mixed()
    with torch.inference_mode(kind == "in inference mode"):
        first = steps(model, batch)
        cache = first.past_key_values
        want = steps(model, gone_on(batch, first.sequences, [0, 1, 2]), past_key_values=copy.deepcopy(cache))
        if kind == "copied":
            cache.reorder_cache(torch.tensor([1, 2, 0]))
            cache = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([1, 2, 0]))
        elif kind == "pickled":
            cache.reorder_cache(torch.tensor([1, 2, 0]))
            buffer = io.BytesIO()
            torch.save(cache, buffer)
            buffer.seek(0)
            cache = torch.load(buffer, weights_only=False)
            cache.reorder_cache(torch.tensor([1, 2, 0]))
        else:
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            if kind == "cropped":
                cache.crop(-2)
        got = steps(model, gone_on(batch, first.sequences, [2, 0, 1]), past_key_values=cache)
    assert_rows(got, want, [2, 0, 1])


def test_a_static_cache(positions: str) -> None:
    """Its tensors are written in place."""
    model = llava()
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    # No padding: before 5.10, a static cache counts tokens by keys that are not zero.
    ids = torch.tensor([ONE, [1, 15, *ONE[2:]], [2, *ONE[1:]]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(3)}
    first = steps(model, batch)
    want = steps(model, gone_on(batch, first.sequences, [0, 1, 2]), past_key_values=first.past_key_values)
    for place in ("anew", "in place"):
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
        again = steps(model, batch, past_key_values=static, disable_compile=True)
        assert torch.equal(again.sequences, first.sequences)
        order = torch.tensor([2, 0, 1])
        for layer in static.layers:
            if place == "anew":
                layer.reorder_cache(order)
            else:
                layer.keys.copy_(layer.keys[order])
                layer.values.copy_(layer.values[order])
        asked = gone_on(batch, first.sequences, [2, 0, 1])
        assert_rows(steps(model, asked, past_key_values=static, disable_compile=True), want, [2, 0, 1])


def test_a_cache_of_windows(positions: str) -> None:
    """Where every layer forgets, the last tokens tell the rows apart."""
    torch.manual_seed(0)
    text = MistralConfig(**{**text_config().to_diff_dict(), "model_type": "mistral"}, sliding_window=6)
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=IMAGE, image_seq_length=TOKENS
    )
    model = sharpen(LlavaForConditionalGeneration(config))
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    batch, _ = mixed()
    first = steps(model, batch)
    cache = copy.deepcopy(first.past_key_values)
    assert max(layer.keys.shape[-2] for layer in cache.layers) < cache.get_seq_length()
    want = steps(model, gone_on(batch, first.sequences, [0, 1, 2]), past_key_values=first.past_key_values)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    got = steps(model, gone_on(batch, first.sequences, [2, 0, 1]), past_key_values=cache)
    assert_rows(got, want, [2, 0, 1])


def test_rows_that_nobody_knows_are_refused() -> None:
    model = llava()
    ocvtp.apply(model, pruner(), keep=KEEP)
    inputs = prompt(ONE, pixels(1))
    first, other = steps(model, inputs), steps(model, prompt([1, 2, *ONE[3:]], pixels(1, seed=4)))
    assert first.past_key_values.get_seq_length() == other.past_key_values.get_seq_length() + 1
    cache = first.past_key_values
    for mine, its in zip(cache.layers, other.past_key_values.layers, strict=True):
        mine.keys, mine.values = (torch.cat([x[..., :1, :], x], -2) for x in (its.keys, its.values))
    ids = torch.cat([first.sequences, torch.tensor([FOLLOW_UP])], dim=1)
    with pytest.raises(ValueError, match=r"row 0 of this cache holds .* start with an empty one"):
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("options", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
def test_a_repeated_cache_for_several_answers(positions: str, options: Inputs) -> None:
    """One prompt's cache, a copy for each answer; ``generate`` repeats the prompt itself."""
    model = llava()
    images = pixels(1)
    prefix = prompt(ONE, images)
    options = {"do_sample": False, "max_new_tokens": 5, **options}

    def answers(keep: int | None) -> torch.Tensor:
        cache = DynamicCache()
        first = model.generate(**prefix, past_key_values=cache, max_new_tokens=2, do_sample=False)
        cache.batch_repeat_interleave(2)
        ids = torch.cat([first, torch.tensor([FOLLOW_UP])], dim=1)
        torch.manual_seed(0)
        got = model.generate(input_ids=ids, past_key_values=cache, **options)
        torch.manual_seed(0)
        assert torch.equal(got, model.generate(input_ids=ids, pixel_values=images, **options))
        return got

    answers(None)
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    answers(KEEP)


def test_answers_of_several_prompts_cannot_share_a_row(positions: str) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    batch, _ = mixed()
    first = steps(model, batch)
    cache = first.past_key_values
    cache.reorder_cache(torch.tensor([0, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    asked = gone_on(batch, first.sequences, [0])
    with pytest.raises(ValueError, match="differ"):
        steps(model, asked, past_key_values=cache, num_beams=2)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, the prompt has 1"):
        steps(model, asked, past_key_values=cache)


@pytest.mark.parametrize("returned", [1, 2])
def test_after_beams_the_cache_has_a_row_for_each(positions: str, returned: int) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    inputs = prompt(ONE, pixels(1))
    out = steps(model, inputs, num_beams=2, num_return_sequences=returned)
    cache = out.past_key_values
    assert cache.layers[0].keys.shape[0] == 2
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(KEEP + len(ONE) - ONE.count(IMAGE) - cache.get_seq_length())  # back to the prompt
    ids = torch.tensor([ONE + FOLLOW_UP])
    got = steps(model, {"input_ids": ids}, past_key_values=cache)
    want = steps(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})
    assert_rows(got, want, [0])


def test_a_traced_call_notes_its_rows() -> None:
    """In one graph; what comes later is compared, since nobody can say that nothing happened."""

    def fill(keys: torch.Tensor) -> Any:
        cache = DynamicCache()
        cache.update(keys, keys, 0)
        write_note(cache, CacheNote(identity(2, 0, 5, keys.device), 5, None))
        return cache

    cache = torch.compile(fill, fullgraph=True, backend="eager")(torch.randn(2, 2, 5, 4))
    cache.reorder_cache(torch.tensor([1, 0]))
    rows = note_of(cache).rows
    assert rows.found_in(cache, 5).tolist() == [1, 0]
