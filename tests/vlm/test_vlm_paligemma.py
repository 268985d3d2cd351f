"""PaliGemma: a prompt that is attended to both ways, answers to learn from, and text of Gemma 1 and 2."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
    StaticCache,
)

import ocvtp
from tests.vlm.families.merged import FAMILIES, TEXT, VISION
from tests.vlm.family import Inputs, by_hand, joined
from tests.vlm.skips import NATIVE_ROUTE, needs_mm_route
from tests.vlm.tiny_llava import GREEDY, IMAGE, PAD, PLAIN, sharpen
from tests.vlm.tiny_merged import compare, first_mask

FAMILY = next(family for family in FAMILIES if family.name == "paligemma")
TEXTS = {
    "gemma": GemmaConfig(**TEXT),
    "gemma2": Gemma2Config(**TEXT, query_pre_attn_scalar=12, sliding_window=64),
}


def paligemma(attention: str = "sdpa", text: str = "gemma") -> PaliGemmaForConditionalGeneration:
    torch.manual_seed(0)
    # Gemma 2 knows eager only.
    implementations = {"vision_config": attention, "text_config": attention if text == "gemma" else "eager"}
    vision = SiglipVisionConfig(**{**VISION, "image_size": 56}, projection_dim=48, vision_use_head=False)
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=TEXTS[text].to_dict(),
        image_token_index=IMAGE,
        projection_dim=48,
        hidden_size=48,
        pad_token_id=PAD,
        attn_implementation=implementations,
    )
    return sharpen(PaliGemmaForConditionalGeneration(config))


def answered() -> dict[str, Inputs]:
    """Prompts with answers to learn from."""
    rows = {}
    for name, row in FAMILY.rows().items():
        ids = torch.cat([row["input_ids"], torch.tensor([[50, 51, 52, 53]])], dim=1)
        kinds = torch.zeros_like(ids)
        kinds[:, -4:] = 1
        labels = torch.where(kinds == 1, ids, -100)
        rows[name] = {**row, "input_ids": ids, "token_type_ids": kinds, "labels": labels}
    return rows


def test_older_releases_are_refused() -> None:
    """They take features as embeddings only, which ``generate`` of this family doesn't."""
    if NATIVE_ROUTE == "mm_encoder_outputs":
        pytest.skip("this transformers hands features over")
    with pytest.raises(ValueError, match=r"pruning paligemma needs transformers >= 5\.18"):
        ocvtp.apply(paligemma(), "grid", keep=5)


@pytest.mark.parametrize("text", TEXTS)
def test_rows(text: str) -> None:
    needs_mm_route()
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    compare(lambda attention: paligemma(attention, text), "vision_tower", pixels, 1)


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_keeping_all_changes_no_bit(text: str) -> None:
    needs_mm_route()
    model, batch = paligemma(text=text), FAMILY.batch()
    live = batch["attention_mask"].bool()
    want = model(**batch).logits[live], model.generate(**batch, **GREEDY)
    ocvtp.apply(model, FAMILY.pruner(), keep=1.0)
    assert torch.equal(model(**batch).logits[live], want[0])
    assert torch.equal(model.generate(**batch, **GREEDY), want[1])


@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prompt_attends_both_ways_and_the_answer_back(side: str, generating: bool) -> None:
    needs_mm_route()
    if generating and side == "right":
        pytest.skip("generate wants padding on the left")
    model, rows = paligemma("eager"), FAMILY.rows() if generating else answered()
    ocvtp.apply(model, "grid", keep=5, **PLAIN)
    batch = {name: value for name, value in joined(list(rows.values()), side).items() if name != "labels"}
    mask = first_mask(model, 0, batch, **(GREEDY if generating else {}))
    width = mask.shape[-1]
    lengths = []
    for made, row in zip(mask[:, 0], rows.values(), strict=True):
        images = int((row["input_ids"] == IMAGE).sum()) // 16
        kinds = row["token_type_ids"][0, 11 * images :]
        lengths.append(len(kinds))
        where = torch.arange(len(kinds))
        want = (where[:, None] >= where[None]) | ((kinds[:, None] == 0) & (kinds[None] == 0))
        inside = made.diagonal().nonzero()[:, 0]  # nothing attends to padding
        live = slice(int(inside[0]), int(inside[0]) + len(kinds))
        assert int(inside[-1]) == live.stop - 1
        assert side == "right" or live.stop == width
        assert torch.equal(made[live, live], want)
        outside = made[live].clone()
        outside[:, live] = False
        assert not outside.any()
    assert max(lengths) == width or side == "right"  # what behind all images is padding in one row stays


@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_positions_start_at_one(positions: Literal["compact", "original"], generating: bool) -> None:
    needs_mm_route()
    model, row = paligemma(), FAMILY.rows()["two"]
    ocvtp.apply(model, "grid", keep=5, positions=positions, **PLAIN)
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        seen.append(kwargs["position_ids"][0])

    model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    if generating:
        model.generate(**row, **GREEDY)
    else:
        model(**row)
    long = row["input_ids"].shape[1]
    short = long - 2 * 11
    last = long if positions == "original" else short
    assert seen[0].shape == (short,)
    assert (int(seen[0][0]), int(seen[0][-1])) == (1, last)
    assert bool((seen[0].diff() > 0).all())
    for i, step in enumerate(seen[1:]):
        assert step.tolist() == [last + 1 + i]


def test_learning_from_answers() -> None:
    needs_mm_route()
    model, pruner = paligemma(), FAMILY.pruner()
    losses = []
    for name, row in answered().items():
        ocvtp.remove(model)
        plain = {key: value for key, value in row.items() if key != "labels"}
        want = by_hand(FAMILY, model, pruner, plain, 5, "compact", {}) if name != "text" else None
        ocvtp.apply(model, pruner, keep=5, **PLAIN)
        out = model(**row)
        losses.append(out.loss.detach())
        if want is not None:
            torch.testing.assert_close(out.logits, want, atol=1e-4, rtol=1e-4)
            loss = torch.nn.functional.cross_entropy(want[0, -5:-1], row["labels"][0, -4:])
            torch.testing.assert_close(losses[-1], loss.detach(), atol=1e-4, rtol=1e-4)
    batch = joined(list(answered().values()), "right")
    torch.testing.assert_close(model(**batch).loss.detach(), torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "adapted",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
@torch.no_grad()
def test_adapted_embeddings(adapted: dict[str, Any]) -> None:
    needs_mm_route()
    peft = pytest.importorskip("peft")
    model, row = paligemma(), FAMILY.rows()["two"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **adapted)).eval()
    want = wrapped(**row).logits
    ocvtp.apply(wrapped.get_base_model(), FAMILY.pruner(), keep=1.0)
    assert torch.equal(wrapped(**row).logits, want)


@torch.no_grad()
def test_an_image_behind_a_cache_is_refused() -> None:
    """``forward`` knows by the pixels that the new tokens attend both ways."""
    needs_mm_route()
    model, row = paligemma(), dict(FAMILY.rows()["one"])
    ocvtp.apply(model, FAMILY.pruner(), keep=5)
    cache = DynamicCache(config=model.config.get_text_config())
    before = torch.tensor([[1, 21, 22]])
    model(input_ids=before, token_type_ids=torch.zeros_like(before), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="behind a cache"):
        model(**row, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 3
    row.pop("token_type_ids")  # without, all is causal
    model(**row, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_cache_that_was_used_before_is_refused() -> None:
    """Empty again, but for upstream it isn't new."""
    needs_mm_route()
    model, row = paligemma(), dict(FAMILY.rows()["one"])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    empty = model(**row, past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert torch.equal(model(**row, past_key_values=cache, use_cache=True).logits, empty)
    cache.reset()
    ocvtp.apply(model, FAMILY.pruner(), keep=1.0)
    with pytest.raises(ValueError, match="behind a cache"):
        model(**row, past_key_values=cache, use_cache=True)
    assert torch.equal(
        model.generate(**row, **GREEDY, past_key_values=cache), model.generate(**row, **GREEDY)
    )
