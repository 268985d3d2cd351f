"""Conversations that take turns the plain suite does not: text first, rows that ended early, no mask."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

import ocvtp
from tests.vlm.families import qwen
from tests.vlm.family import Family, Inputs, families, rope_positions
from tests.vlm.skips import IMAGES_BEHIND_CACHE, VERSION
from tests.vlm.tiny_llava import GREEDY, IMAGE
from tests.vlm.tiny_qwen import VIDEO, VISION_END, VISION_START, grid, pixels, units

TALKING = [pytest.param(family, id=family.name) for family in families() if family.turns]
QWEN = [pytest.param(family, id=family.name) for family in families() if family.mrope]


@functools.cache
def _made(family: Family) -> Any:
    return family.model()


@pytest.fixture
def models() -> Iterator[Any]:
    used = []

    def get(family: Family) -> Any:
        used.append(_made(family))
        return used[-1]

    yield get
    for model in used:
        ocvtp.remove(model)


def answer(model: Any, inputs: Inputs, **options: Any) -> Any:
    return model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True)


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
    first = answer(model, rows["text"])
    if between == "forward":
        model(**rows["one"])
    else:
        answer(model, rows["one"] if between == "generate" else family.batch(["one", "two", "text"]))
    second = family.second()
    ids = torch.cat([first.sequences, second["input_ids"]], dim=1)
    asked = {**second, **whole(second, ids)}
    same(answer(model, asked, past_key_values=first.past_key_values), answer(model, asked))


@pytest.mark.parametrize("family", TALKING)
@pytest.mark.parametrize("all_tokens", [False, True])
@torch.no_grad()
def test_what_is_masked_between_turns_does_not_count(family: Family, models: Any, all_tokens: bool) -> None:
    """A row that ended early is padded by ``generate``; the next turn masks that padding."""
    model = models(family)
    ocvtp.apply(model, family.pruner(), keep=1.0 if all_tokens else family.keep)
    batch = family.batch(["one", "text"])
    first = answer(model, batch)
    long = batch["input_ids"].shape[1]
    ids = torch.cat([first.sequences, torch.tensor([[40, 41, 42]] * 2)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, long:])], dim=1)
    mask[1, long + 2 : first.sequences.shape[1]] = 0
    follow = whole(batch, ids, mask)
    pictures = {name: batch[name] for group in family.pixels.values() for name in group if name in batch}
    same(answer(model, follow, past_key_values=first.past_key_values), answer(model, {**follow, **pictures}))


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
