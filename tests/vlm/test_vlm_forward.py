"""``forward``: training, scoring, argument checks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import ocvtp
from tests.vlm.skips import needs_original
from tests.vlm.tiny_llava import (
    IMAGE,
    KEEP,
    LAYERS,
    NONE,
    ONE,
    PAD,
    TOKENS,
    TWO,
    llava,
    mixed,
    pad,
    pixels,
    prompt,
)

IGNORED = -100


def labelled(rows: list[list[int]], images: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = pad(rows, "right")
    hidden = (batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0)
    return {**batch, "labels": batch["input_ids"].masked_fill(hidden, IGNORED), "pixel_values": images}


def test_loss_of_a_padded_batch_is_the_mean_over_tokens(
    positions: str, route: str, model: Any, oc_pruner: Any
) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    images = pixels(3)
    batch = model(**labelled([ONE, TWO, NONE], images))
    total, tokens = torch.zeros(()), 0
    for row, own in ((ONE, images[:1]), (TWO, images[1:]), (NONE, None)):
        inputs = labelled([row], own) if own is not None else prompt(row)
        labels = torch.tensor([[IGNORED if t in (IMAGE, PAD) else t for t in row]])
        count = int((labels[:, 1:] != IGNORED).sum())
        total = total + count * model(**{**inputs, "labels": labels}).loss
        tokens += count
    torch.testing.assert_close(batch.loss, total / tokens, atol=1e-5, rtol=1e-5)


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_and_gradient_checkpointing(positions: str, route: str, model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    batch = labelled([ONE, TWO, NONE], pixels(3))
    model.train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, batch)
    model.gradient_checkpointing_disable()
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    projector = [n for n in plain if "projector" in n]
    tower = [n for n in plain if "vision_tower" in n and "layers.0." in n]
    assert projector
    assert tower
    assert all(plain[n].abs().sum() > 0 for n in projector)
    assert not any(f"layers.{LAYERS - 1}." in n for n in plain if "vision_tower" in n)  # it never ran
    assert all(p.grad is None for p in oc_pruner.parameters())


@torch.no_grad()
def test_gaps_are_not_packed_sequences(route: str, model: Any, oc_pruner: Any) -> None:
    """Without mask and cache, transformers reads a gap in position_ids as the start of another document."""
    needs_original()
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions="original")
    inputs = prompt(TWO, pixels(2))
    cached = model(**inputs).logits
    uncached = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(uncached, cached, atol=1e-5, rtol=1e-5)
    ones = torch.ones_like(inputs["input_ids"])
    torch.testing.assert_close(model(**inputs, attention_mask=ones, use_cache=False).logits, cached)
    # The trap is real: the same short prompt without a mask is something else.
    seen: dict[str, Any] = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs, use_cache=False)
    handle.remove()
    seen["attention_mask"] = None
    wrong = model.lm_head(model.model.language_model(**seen).last_hidden_state)
    assert not torch.allclose(wrong, cached, atol=1e-2)


@torch.no_grad()
def test_positional_arguments_and_signature(model: Any, oc_pruner: Any) -> None:
    forward, generate = inspect.signature(model.forward), inspect.signature(model.generate)
    inputs = prompt(ONE, pixels(1))
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert inspect.signature(model.forward) == forward
    assert inspect.signature(model.generate) == generate
    assert inspect.signature(inspect.unwrap(model.forward)) == inspect.signature(type(model).forward)
    want = model(**inputs).logits
    assert want.shape[1] == len(ONE) - TOKENS + KEEP
    assert torch.equal(model(inputs["input_ids"], inputs["pixel_values"]).logits, want)
    with pytest.raises(TypeError, match="multiple values"):
        model(inputs["input_ids"], inputs["pixel_values"], input_ids=inputs["input_ids"])


@torch.no_grad()
def test_tuple_output(model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    inputs = prompt(ONE, pixels(1))
    got = model(**inputs, return_dict=False)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], model(**inputs).logits)


@torch.no_grad()
def test_logits_to_keep(route: str, model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    inputs = prompt(ONE, pixels(1))
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])
    wanted = torch.tensor([0, 2, len(ONE) - 3, -1])
    got = model(**inputs, logits_to_keep=wanted).logits
    torch.testing.assert_close(got, full[:, [0, 2, -3, -1]])
    mask = torch.zeros(len(ONE), dtype=torch.bool)
    mask[wanted] = True
    torch.testing.assert_close(model(**inputs, logits_to_keep=mask).logits, full[:, [0, 2, -3, -1]])
    pruned = set(range(TOKENS)) - set(ocvtp.vlm.select(model, inputs["pixel_values"]).indices[0].tolist())
    with pytest.raises(ValueError, match="pruned image token"):
        model(**inputs, logits_to_keep=torch.tensor([3 + min(pruned)]))
    batch, _ = mixed()
    with pytest.raises(ValueError, match="same columns in every row"):
        model(**batch, logits_to_keep=wanted)
    with pytest.raises(ValueError, match="pass an int"):
        model.generate(**inputs, logits_to_keep=wanted)


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_what_cannot_be_shortened_is_refused(model: Any, oc_pruner: Any, method: str) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    call = getattr(model, method)
    inputs = prompt(ONE, pixels(1))
    width = len(ONE)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(ValueError, match="2-D attention_mask"):
        call(**inputs, attention_mask=torch.zeros(1, 1, width, width))
    with pytest.raises(ValueError, match="2-D attention_mask"):
        call(**inputs, attention_mask={"full_attention": torch.zeros(1, 1, width, width)})
    with pytest.raises(ValueError, match="they must agree"):
        call(**inputs, attention_mask=torch.ones(1, width + 1, dtype=torch.long))
    if method == "generate":
        with pytest.raises(ValueError, match="inputs_embeds"):
            call(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        call(**inputs, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="Pixtral"):
        call(**inputs, image_sizes=torch.tensor([[56, 56]]))
    if method == "forward":
        with pytest.raises(ValueError, match="shift_labels"):
            call(**inputs, shift_labels=inputs["input_ids"])
        with pytest.raises(ValueError, match="labels must have the shape"):
            call(**inputs, labels=inputs["input_ids"][:, 1:])


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("keep", [KEEP, TOKENS])
def test_placeholders_must_match_the_images(model: Any, oc_pruner: Any, method: str, keep: int) -> None:
    ocvtp.apply(model, oc_pruner, keep=keep)
    call = getattr(model, method)
    for row, images in ((ONE, 2), (TWO, 1), (NONE, 1), ([t for t in ONE if t != IMAGE] + [IMAGE] * 9, 1)):
        with pytest.raises(ValueError, match="placeholders per row"):
            call(**prompt(row, pixels(images)))
    # As many in all, but an image may not straddle two rows.
    straddling = torch.tensor([[1, *[IMAGE] * (TOKENS - 1), 5], [1, *[IMAGE] * (TOKENS - 1), 5]])
    straddling[0, -1] = straddling[1, -1] = IMAGE
    straddling[0, 0] = IMAGE
    straddling[1, 1] = 7
    with pytest.raises(ValueError, match="those of whole ones in every row"):
        call(input_ids=straddling, pixel_values=pixels(2))


@torch.no_grad()
def test_masked_placeholders_still_take_their_rows(model: Any, oc_pruner: Any) -> None:
    inputs = prompt(TWO, pixels(2))
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 2 : 2 + TOKENS] = 0  # hide the first image
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    got = model(**inputs, attention_mask=mask).logits
    assert got.shape[1] == len(TWO) - 2 * (TOKENS - KEEP)
    other = model(
        input_ids=inputs["input_ids"],
        pixel_values=torch.cat([pixels(1, seed=9), inputs["pixel_values"][1:]]),
        attention_mask=mask,
    ).logits
    torch.testing.assert_close(got[:, -4:], other[:, -4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_token_type_ids_follow_their_tokens(model: Any, oc_pruner: Any) -> None:
    seen: dict[str, Any] = {}
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    inputs = prompt(ONE, pixels(1))
    types = (inputs["input_ids"] == IMAGE).long()
    model(**inputs, token_type_ids=types, mm_token_type_ids=2 * types)
    kept = [0] * 3 + [1] * KEEP + [0] * 3
    assert seen["token_type_ids"].tolist() == [kept]
    assert seen["mm_token_type_ids"].tolist() == [[2 * t for t in kept]]


def test_encoded_images_are_not_pruned_twice(oc_pruner: Any) -> None:
    model = llava()
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("needs mm_encoder_outputs: transformers >= 5.18")
    inputs = prompt(ONE, pixels(1))
    with torch.no_grad():
        encoded = {"image": model.get_image_features(inputs["pixel_values"], return_dict=True)}
        want = model(**inputs).logits
        ocvtp.apply(model, oc_pruner, keep=KEEP)
        got = model(input_ids=inputs["input_ids"], mm_encoder_outputs=encoded).logits
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="at the same time"):
        model(**inputs, mm_encoder_outputs=encoded)
