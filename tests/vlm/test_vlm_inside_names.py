"""Methods inside the language model by name, fitted to a budget."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import ocvtp
from ocvtp.methods.in_llm import Inside, averages, by_name
from tests.vlm.family import by_name as family
from tests.vlm.tiny_llava import IMAGE, ONE, TOKENS, llava, pixels, prompt, text_config, vision_config


def deep() -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(num_hidden_layers=16),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["dart", "fastv", "pyramiddrop", "sparsevlm"])
def test_a_name_keeps_what_was_asked_on_average(name: Inside) -> None:
    model = deep()
    inputs = prompt(ONE, pixels(1))
    with torch.no_grad():
        whole = model(**inputs).logits.shape[1]
        report = ocvtp.apply(model, name, keep=8)
        short = model(**inputs).logits.shape[1]
        assert short < whole
        ocvtp.remove(model)
        assert model(**inputs).logits.shape[1] == whole
    text = str(report)
    assert "chosen by" not in text
    assert "layers get" in text
    method = by_name(name, 8, depth=16, tokens=TOKENS)
    assert abs(averages(method, depth=16, tokens=TOKENS).entering - 8) < 0.5


@pytest.mark.parametrize("name", get_args(Inside))
@pytest.mark.parametrize(("depth", "budgets"), [(32, (192, 128, 64)), (28, (192, 128)), (36, (192, 128, 64))])
def test_budgets_are_what_goes_into_the_layers(name: Inside, depth: int, budgets: tuple[int, ...]) -> None:
    for budget in budgets:
        found = averages(by_name(name, budget, depth=depth, tokens=576), depth=depth, tokens=576)
        assert abs(found.entering - budget) <= 1.5, (name, depth, budget)


def test_what_a_name_cannot_do_is_refused_in_words() -> None:
    model = deep()
    with pytest.raises(ValueError, match=r"average 1 vision tokens.*between 2\.0 and 16 tokens"):
        ocvtp.apply(model, "fastv", keep=1)
    with pytest.raises(ValueError, match="refine is for what is dropped before the language model, not for"):
        ocvtp.apply(model, "fastv", keep=8, refine=1)
    with pytest.raises(
        ValueError, match=r"published for 32 layers, and this language model has 2: say where"
    ):
        ocvtp.apply(llava(), "fastv", keep=8)
    with pytest.raises(ValueError, match=r"differ in size, so keep of 'dart' must be a share"):
        ocvtp.apply(family("llava_next").model(), "dart", keep=8)
    with pytest.raises(ValueError, match="name must be one of dart, fastv"):
        by_name("slowv", 8, depth=32)  # type: ignore[arg-type]
    assert "_ocvtp" not in model.__dict__
