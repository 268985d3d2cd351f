"""Conversations that go on with the cache of a pruned call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import ocvtp
from tests.vlm.skips import IMAGES_BEHIND_CACHE, needs_images_behind_cache, needs_original
from tests.vlm.tiny_llava import GREEDY, IMAGE, KEEP, NONE, ONE, TOKENS, TWO, mixed, pad, pixels, prompt

NEW = GREEDY["max_new_tokens"]
FOLLOW_UP = [40, 41, 42]
SECOND_IMAGE = [43, *[IMAGE] * TOKENS, 44, 45]


@pytest.fixture
def patched(model: Any, oc_pruner: Any, positions: str, route: str) -> Any:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    return model


def ask(model: Any, ids: torch.Tensor, cache: Any, images: torch.Tensor | None = None, **more: Any) -> Any:
    inputs = {"input_ids": ids, "past_key_values": cache, **more}
    if images is not None:
        inputs["pixel_values"] = images
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)


def extended(sequences: torch.Tensor, text: list[int]) -> torch.Tensor:
    return torch.cat([sequences, torch.tensor([text]).expand(sequences.shape[0], -1)], dim=1)


def assert_same_answer(got: Any, want: Any, old: int) -> None:
    assert torch.equal(
        got.sequences[:, old:], want.sequences[:, want.sequences.shape[1] - got.sequences.shape[1] + old :]
    )
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own_cache", [True, False])
@pytest.mark.parametrize("first", [ONE, TWO])
def test_three_turns_equal_one_long_prompt(patched: Any, own_cache: bool, first: list[int]) -> None:
    count = first.count(IMAGE) // TOKENS
    images = pixels(count + 1)
    cache = DynamicCache() if own_cache else None
    turn = ask(patched, torch.tensor([first]), cache, images[:count])
    turns = [(FOLLOW_UP, None, count), (SECOND_IMAGE, images[count:], count + 1)]
    for text, new_images, so_far in turns[: 1 + IMAGES_BEHIND_CACHE]:
        cache = cache if own_cache else turn.past_key_values
        ids = extended(turn.sequences, text)
        turn = ask(patched, ids, cache, new_images)
        assert torch.equal(turn.sequences[:, : ids.shape[1]], ids)
        fresh = ask(patched, ids, None, images[:so_far])
        assert_same_answer(turn, fresh, ids.shape[1])
        assert turn.past_key_values.get_seq_length() == fresh.past_key_values.get_seq_length()


@pytest.mark.parametrize("with_image", [False, True])
def test_a_padded_batch_goes_on(patched: Any, with_image: bool) -> None:
    if with_image:
        needs_images_behind_cache()
    batch, _ = mixed()
    turn = ask(
        patched, batch["input_ids"], None, batch["pixel_values"], attention_mask=batch["attention_mask"]
    )
    text = SECOND_IMAGE if with_image else FOLLOW_UP
    ids = extended(turn.sequences, text)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW + len(text)), value=1)
    fresh_images = pixels(3, seed=8)
    old = batch["pixel_values"]
    got = ask(patched, ids, turn.past_key_values, fresh_images if with_image else None, attention_mask=mask)
    everything = old
    if with_image:
        everything = torch.cat([old[:1], fresh_images[:1], old[1:], fresh_images[1:2], fresh_images[2:]])
    want = ask(patched, ids, None, everything, attention_mask=mask)
    assert_same_answer(got, want, ids.shape[1])


def test_rows_of_a_turn_may_differ_in_images(patched: Any) -> None:
    """One row gets a second image, the other text of the same length: padding inside the sequence."""
    needs_images_behind_cache()
    images = pixels(3)
    turn = ask(patched, torch.tensor([ONE, ONE]), None, images[:2])
    text = [50 + i for i in range(len(SECOND_IMAGE))]
    ids = torch.cat([turn.sequences, torch.tensor([SECOND_IMAGE, text])], dim=1)
    mask = torch.ones_like(ids)
    got = ask(patched, ids, turn.past_key_values, images[2:], attention_mask=mask)
    for row, own in ((0, images[[0, 2]]), (1, images[[1]])):
        want = ask(patched, ids[row : row + 1], None, own)
        assert torch.equal(got.sequences[row, ids.shape[1] :], want.sequences[0, ids.shape[1] :])
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_forward_turn_may_differ_in_images(patched: Any) -> None:
    images = pixels(3)
    first = patched(input_ids=torch.tensor([ONE, ONE]), pixel_values=images[:2], use_cache=True)
    text = [50 + i for i in range(len(SECOND_IMAGE))]
    new = torch.tensor([SECOND_IMAGE, text])
    got = patched(input_ids=new, pixel_values=images[2:], past_key_values=first.past_key_values).logits
    for row, own in ((0, images[[0, 2]]), (1, images[[1]])):
        ids = torch.tensor([ONE + new[row].tolist()])
        want = patched(input_ids=ids, pixel_values=own).logits[0]
        torch.testing.assert_close(got[row, -2:], want[-2:], atol=1e-4, rtol=1e-4)


def test_a_failure_before_the_cache_is_touched(patched: Any) -> None:
    class Fault(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Fault

    turn = ask(patched, torch.tensor([ONE]), None, pixels(1))
    ids = extended(turn.sequences, FOLLOW_UP)
    handle = patched.model.language_model.register_forward_pre_hook(fail)
    with pytest.raises(Fault):
        ask(patched, ids, turn.past_key_values)
    handle.remove()
    want = ask(patched, ids, None, pixels(1))
    assert_same_answer(ask(patched, ids, turn.past_key_values), want, ids.shape[1])


def test_an_unpruned_first_turn(patched: Any) -> None:
    needs_images_behind_cache()
    turn = ask(patched, torch.tensor([NONE]), DynamicCache())
    ids = extended(turn.sequences, SECOND_IMAGE)
    got = ask(patched, ids, turn.past_key_values, pixels(1))
    assert_same_answer(got, ask(patched, ids, None, pixels(1)), ids.shape[1])


def test_keeping_all_over_turns_is_the_unpatched_model(
    model: Any, oc_pruner: Any, positions: str, route: str
) -> None:
    needs_images_behind_cache()
    images = pixels(2)

    def chat() -> list[torch.Tensor]:
        turn = ask(model, torch.tensor([ONE]), DynamicCache(), images[:1])
        second = ask(model, extended(turn.sequences, FOLLOW_UP), turn.past_key_values)
        third = ask(model, extended(second.sequences, SECOND_IMAGE), second.past_key_values, images[1:])
        return [turn.sequences, second.sequences, third.sequences]

    want = chat()
    ocvtp.apply(model, oc_pruner, keep=TOKENS, positions=positions)
    assert all(torch.equal(a, b) for a, b in zip(chat(), want, strict=True))


@torch.no_grad()
def test_decoding_by_hand(patched: Any) -> None:
    """A loop around ``forward`` that counts long columns, as the user sees them."""
    batch, _ = mixed()
    rows = {k: v[:2] for k, v in batch.items() if k != "pixel_values"}
    images = batch["pixel_values"]
    want = patched.generate(**rows, pixel_values=images, **GREEDY)[:, -NEW:]
    out = patched(**rows, pixel_values=images, use_cache=True)
    mask, tokens = rows["attention_mask"], []
    for _ in range(NEW):
        tokens.append(out.logits[:, -1:].argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = patched(
            input_ids=tokens[-1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
        )
    assert torch.equal(torch.cat(tokens, 1), want)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        patched(input_ids=tokens[-1], attention_mask=mask[:, 2:], past_key_values=out.past_key_values)


@torch.no_grad()
def test_forward_after_generate_and_back(patched: Any) -> None:
    needs_images_behind_cache()
    images = pixels(2)
    turn = ask(patched, torch.tensor([ONE]), None, images[:1])
    ids = extended(turn.sequences, SECOND_IMAGE)
    want = patched(input_ids=ids, pixel_values=images).logits[:, -1]
    rest = ids[:, turn.sequences.shape[1] - 1 :]  # the last generated token is not in the cache yet
    got = patched(input_ids=rest, pixel_values=images[1:], past_key_values=turn.past_key_values)
    torch.testing.assert_close(got.logits[:, -1], want, atol=1e-4, rtol=1e-4)
    longer = extended(ids, FOLLOW_UP)
    answer = ask(patched, longer, got.past_key_values)
    assert_same_answer(answer, ask(patched, longer, None, images), longer.shape[1])


def test_copied_and_cropped_caches(patched: Any) -> None:
    turn = ask(patched, torch.tensor([ONE]), None, pixels(1))
    first, second = turn.past_key_values, copy.deepcopy(turn.past_key_values)
    ids = extended(turn.sequences, FOLLOW_UP)
    want = ask(patched, ids, first)
    assert_same_answer(ask(patched, ids, second), want, ids.shape[1])
    # Take the follow-up and its answer back, and ask something else.
    second.crop(-(len(FOLLOW_UP) + NEW))
    other = extended(turn.sequences, [60, 61])
    assert_same_answer(ask(patched, other, second), ask(patched, other, None, pixels(1)), other.shape[1])
    second.crop(6 - second.get_seq_length())  # into the image
    with pytest.raises(ValueError, match="start with an empty one"):
        ask(patched, other, second)


def test_misused_caches_are_refused(patched: Any) -> None:
    turn = ask(patched, torch.tensor([ONE]), None, pixels(1))
    cache = turn.past_key_values
    with pytest.raises(ValueError, match="pass the whole conversation"):
        ask(patched, torch.tensor([FOLLOW_UP]), cache)
    with pytest.raises(ValueError, match="cache holds 1 sequences"):
        ask(patched, extended(turn.sequences, FOLLOW_UP).repeat(2, 1), cache)
    ids = extended(turn.sequences, FOLLOW_UP)
    refusal = r"placeholders per row|needs transformers"
    with pytest.raises(ValueError, match=refusal):  # the old image again
        ask(patched, ids, cache, pixels(1))
    # After all these failures the cache is as good as before.
    assert_same_answer(ask(patched, ids, cache), ask(patched, ids, None, pixels(1)), ids.shape[1])


def test_an_emptied_cache_starts_over(patched: Any) -> None:
    cache = DynamicCache()
    ask(patched, torch.tensor([ONE]), cache, pixels(1))
    cache.crop(-cache.get_seq_length())
    got = ask(patched, torch.tensor([NONE]), cache)
    assert_same_answer(got, ask(patched, torch.tensor([NONE]), None), len(NONE))


def test_flash_attention_with_gaps_behind_a_cache(model: Any, oc_pruner: Any) -> None:
    needs_images_behind_cache()
    needs_original()
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions="original", weigh=False)
    turn = ask(model, torch.tensor([ONE]), None, pixels(1))
    text_config = model.config.get_text_config()
    before = text_config._attn_implementation
    text_config._attn_implementation = "flash_attention_2"
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions="original")
    text_config._attn_implementation = before
    ids = extended(turn.sequences, SECOND_IMAGE)
    with pytest.raises(ValueError, match="flash attention"):
        ask(model, ids, turn.past_key_values, pixels(1))


def test_padding_between_turns(patched: Any) -> None:
    """Left padding in the first turn of one row only; the numbering must not count it."""
    batch = pad([ONE, [1, 2, *ONE]])
    images = pixels(2)
    turn = ask(patched, batch["input_ids"], None, images, attention_mask=batch["attention_mask"])
    ids = extended(turn.sequences, FOLLOW_UP)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW + 3), value=1)
    got = ask(patched, ids, turn.past_key_values, attention_mask=mask)
    alone = ask(patched, ids[:1, 2:], None, images[:1])
    for a, b in zip(got.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(prompt(ONE)["input_ids"][0], ids[0, 2 : 2 + len(ONE)])


def test_an_image_behind_a_cache_on_old_versions(
    model: Any, oc_pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ocvtp.vlm.resolving.route_of", lambda model: "inputs_embeds")
    monkeypatch.setattr("transformers.__version__", "5.2.0")
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    turn = ask(model, torch.tensor([ONE]), None, pixels(1))
    with pytest.raises(ValueError, match=r"transformers >= 5\.3"):
        ask(model, extended(turn.sequences, SECOND_IMAGE), turn.past_key_values, pixels(1))
