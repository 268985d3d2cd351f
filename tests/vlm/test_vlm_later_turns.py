"""Conversations that take turns the plain suite does not: text first, rows that ended early, no mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache

import ocvtp
from ocvtp.vlm.families import adapter_for
from tests.vlm.families import qwen
from tests.vlm.family import Family, Inputs, families, rope_positions, steps
from tests.vlm.skips import IMAGES_BEHIND_CACHE, VERSION
from tests.vlm.tiny_llava import IMAGE
from tests.vlm.tiny_qwen import VIDEO, VISION_END, VISION_START, grid, pixels, units

TALKING = [pytest.param(family, id=family.name) for family in families() if family.turns]
QWEN = [pytest.param(family, id=family.name) for family in families() if family.mrope]


def same(got: Any, want: Any) -> None:
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def whole(like: Inputs, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Inputs:
    made: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in like:
            made[name] = (ids == IMAGE).to(like[name].dtype)
    return made


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("between", ["generate", "forward", "a batch"])
@torch.no_grad()
def test_a_conversation_that_starts_with_text_knows_no_other(
    family: Family, models: Any, between: str
) -> None:
    """Its first turn is not pruned and leaves no note; another conversation leaves its ``rope_deltas``."""
    if not IMAGES_BEHIND_CACHE or Version(family.image_turns) > VERSION:
        pytest.skip("this release can't take an image behind a cache")
    model, rows = models(family), family.rows()
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    first = steps(model, rows["text"])
    if between == "forward":
        model(**rows["one"])
    else:
        steps(model, rows["one"] if between == "generate" else family.batch(["one", "two", "text"]))
    second = family.second()
    ids = torch.cat([first.sequences, second["input_ids"]], dim=1)
    asked = {**second, **whole(second, ids)}
    same(steps(model, asked, past_key_values=first.past_key_values), steps(model, asked))


def prefilled(family: Family, model: Any, kinds: list[str]) -> tuple[Any, Inputs, Inputs]:
    """An unpatched turn with images, and what the next one asks, on its cache and as one prompt."""
    if not IMAGES_BEHIND_CACHE or Version(family.image_turns) > VERSION:
        pytest.skip("this release can't take an image behind a cache")
    batch, second = family.batch(kinds), family.second()
    cache = DynamicCache()
    first = steps(model, batch, past_key_values=cache)
    count = len(kinds)
    ids = torch.cat([first.sequences, second["input_ids"].expand(count, -1)], dim=1)
    old = batch["attention_mask"]
    mask = torch.nn.functional.pad(old, (0, ids.shape[1] - old.shape[1]), value=1)
    names = [name for name in family.pixels["image"] if name in second]
    new = {name: torch.cat([second[name]] * count) for name in names}
    # Of each row, the image of the first turn, then that of the second.
    parts = {name: [x for k in kinds for x in (family.rows()[k][name], second[name])] for name in names}
    everything = {name: torch.cat(part) for name, part in parts.items()}
    text = whole(second, ids, mask)
    return cache, {**text, **new}, {**text, **everything}


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("kinds", [["one"], ["one", "two"]])
@torch.no_grad()
def test_an_image_turn_on_the_cache_of_the_unpatched_model(
    family: Family, models: Any, kinds: list[str]
) -> None:
    """Positions go on from the ``rope_deltas`` that the model left."""
    model = models(family)
    cache, asked, long = prefilled(family, model, kinds)
    ocvtp.apply(model, family.pruner(), keep=1.0)
    same(steps(model, asked, past_key_values=cache), steps(model, long))


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_positions_forgotten_since_are_not_guessed(family: Family, models: Any) -> None:
    """A batch in between leaves ``rope_deltas`` that are no conversation's of one row."""
    model = models(family)
    cache, asked, long = prefilled(family, model, ["one"])
    ocvtp.apply(model, family.pruner(), keep=1.0)
    steps(model, family.batch(["one", "two"]))
    with pytest.raises(ValueError, match=r"a call of 2: .* Start the conversation anew"):
        steps(model, asked, past_key_values=cache)
    old = cache.get_seq_length()
    new = {name: asked[name] for name in family.pixels["image"] if name in asked}
    new |= whole(asked, asked["input_ids"][:, old:])
    del new["attention_mask"]
    numbers = rope_positions(model, long)[:, :, old:]  # who numbers tokens needs no memory
    got = model(**new, position_ids=numbers, past_key_values=cache).logits
    torch.testing.assert_close(got, model(**long).logits[:, old:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_what_the_model_recalls_is_repeated_for_copies_of_a_row(family: Family, models: Any) -> None:
    """As upstream does for beams."""
    model = models(family)
    adapter = adapter_for(model)
    model.model.rope_deltas = None
    assert adapter.recall(3) == 0
    model.model.rope_deltas = torch.tensor([[-5], [-2]])
    assert torch.equal(adapter.recall(4), torch.tensor([[-5], [-5], [-2], [-2]]))


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("numbered", ["by the model", "by the caller"])
@torch.no_grad()
def test_a_row_that_sits_a_turn_out_stays_where_it_was(family: Family, models: Any, numbered: str) -> None:
    """Masked columns don't move it on, whatever their position."""
    model, rows = models(family), family.rows()
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    batch = family.batch(["one", "text"])
    cache = model(**batch, use_cache=True).past_key_values
    mask, more = batch["attention_mask"], {}
    if numbered == "by the caller":
        start = int(rope_positions(model, rows["one"]).max()) + 1
        more["position_ids"] = torch.arange(start, start + 3).expand(3, 2, -1)
    for new, live in (([40, 41, 42], 0), ([43, 44], 1)):
        ids = torch.tensor([new] * 2)
        mask = torch.cat([mask, torch.tensor([[1], [live]]).expand(-1, len(new))], dim=1)
        got = model(**whole(batch, ids, mask), past_key_values=cache, **more).logits
        more = {}
    for row, (kind, text) in enumerate((("one", [40, 41, 42, 43, 44]), ("text", [43, 44]))):
        alone = dict(rows[kind])
        ids = torch.cat([alone.pop("input_ids"), torch.tensor([text])], dim=1)
        want = model(**{**alone, **whole(alone, ids)}).logits
        torch.testing.assert_close(got[row, -2:], want[0, -2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TALKING)
@pytest.mark.parametrize("all_tokens", [False, True])
@torch.no_grad()
def test_what_is_masked_between_turns_does_not_count(family: Family, models: Any, all_tokens: bool) -> None:
    """A row that ended early is padded by ``generate``; the next turn masks that padding."""
    model = models(family)
    ocvtp.apply(model, family.pruner(), keep=1.0 if all_tokens else family.keep)
    batch = family.batch(["one", "text"])
    first = steps(model, batch)
    long = batch["input_ids"].shape[1]
    ids = torch.cat([first.sequences, torch.tensor([[40, 41, 42]] * 2)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, long:])], dim=1)
    mask[1, long + 2 : first.sequences.shape[1]] = 0
    follow = whole(batch, ids, mask)
    pictures = {name: batch[name] for group in family.pixels.values() for name in group if name in batch}
    same(steps(model, follow, past_key_values=first.past_key_values), steps(model, {**follow, **pictures}))


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_without_a_mask_every_row_ends_with_its_last_token(family: Family, models: Any) -> None:
    """Rows of one length that lose different numbers of tokens have to be padded, on the left."""
    model = models(family)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    alone, rows = [], []
    for which, text in ((0, 3), (1, 18)):
        row = [1, *qwen.image(which), *range(5, 5 + text)]
        rows.append(row)
        alone.append(model(**qwen.with_types(model, row, **qwen.picture(which))).logits)
    assert len(rows[0]) == len(rows[1])
    assert alone[0].shape != alone[1].shape
    ids = torch.tensor(rows)
    both = {**qwen.with_types(model, rows[0], **qwen.picture(0, 1)), "input_ids": ids}
    if "mm_token_type_ids" in both:
        both["mm_token_type_ids"] = (ids == IMAGE).int()
    for mask in (None, torch.ones_like(ids)):
        together = model(**both, attention_mask=mask, logits_to_keep=1).logits
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[-1], want[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [each for each in QWEN if each.id == "qwen2_5_vl"])
@torch.no_grad()
def test_text_goes_on_behind_frames_that_keep_nothing(family: Family, models: Any) -> None:
    """A prompt that ends in a video of large time steps, whose last frames are dropped."""
    model, frames = models(family), grid((8, 4, 4))
    row = [1, 2, VISION_START, *[VIDEO] * units(frames)[0], VISION_END]
    inputs = qwen.with_types(
        model,
        row[:-1],
        pixel_values_videos=pixels(frames, 8),
        video_grid_thw=frames,
        second_per_grid_ts=torch.tensor([5.0]),
    )
    follows = int(rope_positions(model, inputs).max()) + 1
    ocvtp.apply(model, family.pruner(), keep=1, frames="all")
    short = model(**inputs).logits.shape[1]
    assert short == 4
    assert model.model.rope_deltas.item() == follows - short
