"""``forward`` with embeddings in the place of ids: the caller's, and PEFT's trained prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import LlavaConfig, LlavaForConditionalGeneration

import ocvtp
from tests.vlm.family import Family, families
from tests.vlm.skips import NATIVE_ROUTE, needs_images_behind_cache
from tests.vlm.tiny_llava import (
    GREEDY,
    IMAGE,
    KEEP,
    ONE,
    TOKENS,
    llava,
    mixed,
    pad,
    pixels,
    prompt,
    pruner,
    sharpen,
    text_config,
    vision_config,
)

FAMILIES = [pytest.param(family, id=family.name) for family in families()]
VIRTUAL = 3
PROMPTS: dict[str, PeftConfig] = {
    "prompt tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL),
    "prefix tuning": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL),
    "p-tuning": PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_callers_embeddings(family: Family, models: Any) -> None:
    model = models(family)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    for kind in ("one", "two"):
        inputs = dict(family.rows()[kind])
        want = model(**inputs).logits
        ids = inputs.pop("input_ids")
        embeddings = model.get_input_embeddings()(ids)
        got = model(**inputs, inputs_embeds=embeddings).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_either_route_and_numbering(route: str, positions: str) -> None:
    model, (batch, _) = llava(), mixed()
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    labels = torch.where(batch["input_ids"] == IMAGE, -100, batch["input_ids"])
    want = model(**batch, labels=labels)
    ids = batch.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    got = model(**batch, inputs_embeds=embeddings, labels=labels)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    used = embeddings.grad.abs().sum(-1) > 0
    assert used[ids != IMAGE].sum() >= (labels > 0).sum() - len(ids)  # nothing follows a row's last token
    assert not used[ids == IMAGE].any()
    with pytest.raises(ValueError, match="pass input_ids alone"):
        model.generate(**batch, inputs_embeds=embeddings)


@torch.no_grad()
def test_behind_a_cache(route: str) -> None:
    if route == "inputs_embeds":
        needs_images_behind_cache()
    model, images = llava(), pixels(2)
    ocvtp.apply(model, pruner(), keep=KEEP)
    new = torch.tensor([[43, *[IMAGE] * TOKENS, 44, 45]])
    answers = []
    for brought in ({"input_ids": new}, {"inputs_embeds": model.get_input_embeddings()(new)}):
        cache = model(**prompt(ONE, images[:1]), use_cache=True).past_key_values
        answers.append(model(**brought, pixel_values=images[1:], past_key_values=cache).logits)
    torch.testing.assert_close(*answers)


def prompted(kind: str) -> Any:
    """A model behind a trained prompt: PEFT looks for embeddings by the number of rows."""
    torch.manual_seed(0)
    vision = vision_config()
    vision.intermediate_size = 96
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return get_peft_model(sharpen(LlavaForConditionalGeneration(config)), PROMPTS[kind]).eval()


@pytest.mark.parametrize("kind", PROMPTS)
def test_trained_prompts(kind: str) -> None:
    model = prompted(kind)
    images = pixels(2)
    batch = {**pad([ONE, [1, 2, *ONE]]), "pixel_values": images}
    labels = torch.where(batch["input_ids"] == IMAGE, -100, batch["input_ids"])

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        out = model(**batch, labels=labels)
        out.loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert found
        return out.loss.detach(), found

    want = gradients()
    ocvtp.apply(model, pruner(), keep=TOKENS)
    got = gradients()
    torch.testing.assert_close(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b)
    ocvtp.apply(model, pruner(), keep=KEEP)
    loss, _ = gradients()
    assert not torch.allclose(loss, want[0])
    with torch.no_grad():
        logits = model(**batch).logits
    virtual = 0 if kind == "prefix tuning" else VIRTUAL
    assert logits.shape[1] == virtual + batch["input_ids"].shape[1] - TOKENS + KEEP
    with torch.no_grad():
        if NATIVE_ROUTE == "inputs_embeds":
            with pytest.raises(ValueError, match=r"trained prompts: .* transformers 5\.18"):
                model.generate(**batch, **GREEDY)
            return
        answered = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    # The row without padding: forward and generate number what is behind it differently.
    torch.testing.assert_close(logits[1, -1], answered.logits[0][1], atol=1e-4, rtol=1e-4)
