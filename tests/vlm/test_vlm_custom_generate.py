"""``custom_generate``: a folder with a function, or a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import ocvtp
from tests.vlm.family import Family, Inputs, families
from tests.vlm.skips import needs_mm_route
from tests.vlm.tiny_llava import GREEDY, KEEP, ONE, llava, mixed, pixels, prompt, pruner

FAMILIES = [pytest.param(family, id=family.name) for family in families()]
NEW = GREEDY["max_new_tokens"]

DOCUMENTED = '''
import torch

def generate(model, input_ids, generation_config=None, left_padding=None, **kwargs):
    """A loop of its own, with the signature that transformers documents."""
    steps = kwargs.pop("max_new_tokens")
    for name in ("do_sample", "synced_gpus", "inputs"):
        kwargs.pop(name, None)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    mask = kwargs.pop("attention_mask", None)
    mask = torch.ones_like(input_ids) if mask is None else mask
    cache, new = kwargs.pop("past_key_values", None), input_ids
    for step in range(steps):
        more = {} if step else kwargs
        out = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, new], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    if left_padding:
        input_ids = torch.nn.functional.pad(input_ids, (left_padding, 0), value=3)
    return input_ids
'''

WRAPPED = '''
from transformers import GenerationMixin

def generate(model, **kwargs):
    """As the functions on the Hub do: transformers' own, with another decoding method."""
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
    return GenerationMixin.generate(model, custom_generate=loop, **kwargs)
'''

AGAIN = '''
def generate(model, input_ids, generation_config=None, **kwargs):
    """The model's own ``generate``, patched as it is."""
    return model.generate(input_ids=input_ids, **kwargs)
'''

OTHER = """
def generate(model, input_ids, **kwargs):
    return {"length": input_ids.shape[1]}
"""


@pytest.fixture(autouse=True)
def modules_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def written(code: str) -> Inputs:
        place = tmp_path / "repository" / "custom_generate"
        place.mkdir(parents=True)
        (place / "generate.py").write_text(code)
        return {"custom_generate": str(place.parent), "trust_remote_code": True}

    return written


@pytest.mark.parametrize("code", [WRAPPED, AGAIN], ids=["wrapped", "again"])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_a_folder(folder: Any, route: str, positions: str, code: str, all_tokens: bool) -> None:
    model, inputs = llava(), prompt(ONE, pixels(1))
    ocvtp.apply(model, pruner(), keep=1.0 if all_tokens else KEEP, positions=positions)
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, **folder(code)), want)


@pytest.mark.parametrize("code", [DOCUMENTED, WRAPPED], ids=["documented", "wrapped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_every_family(folder: Any, models: Any, family: Family, code: str) -> None:
    if code is DOCUMENTED:
        needs_mm_route()  # ids or embeddings: that loop takes no pair of them
        if family.mrope:
            pytest.skip("that loop passes a whole mask, which fails unpatched as well")
    model, inputs = models(family), family.rows()["one"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, **folder(code)), want)


def test_a_folder_and_a_batch(folder: Any) -> None:
    needs_mm_route()
    model, (batch, _) = llava(), mixed()
    ocvtp.apply(model, pruner(), keep=KEEP)
    want = model.generate(**batch, **GREEDY)
    here = folder(DOCUMENTED)
    assert torch.equal(model.generate(**batch, **GREEDY, **here), want)
    padded = model.generate(**batch, **GREEDY, **here, left_padding=2)  # an argument of its own
    assert torch.equal(padded, torch.nn.functional.pad(want, (2, 0), value=3))


def test_a_folder_gets_ids_under_the_callers_name(folder: Any) -> None:
    model, inputs = llava(), prompt(ONE, pixels(1))
    ocvtp.apply(model, pruner(), keep=KEEP)
    ids = inputs.pop("input_ids")
    here = folder("def generate(model, inputs, **kwargs):\n    return model.generate(inputs, **kwargs)\n")
    want = model.generate(ids, **inputs, **GREEDY)
    assert torch.equal(model.generate(ids, **inputs, **GREEDY, **here), want)
    assert torch.equal(model.generate(inputs=ids, **inputs, **GREEDY, **here), want)


def test_whatever_else_a_folder_returns(folder: Any) -> None:
    model, inputs = llava(), prompt(ONE, pixels(1))
    ocvtp.apply(model, pruner(), keep=KEEP)
    assert model.generate(**inputs, **GREEDY, **folder(OTHER)) == {"length": len(ONE) - 16 + KEEP}


def test_a_folder_fills_the_callers_cache(folder: Any) -> None:
    needs_mm_route()
    model, inputs = llava(), prompt(ONE, pixels(1))
    ocvtp.apply(model, pruner(), keep=KEEP)
    cache = DynamicCache()
    first = model.generate(**inputs, **GREEDY, **folder(DOCUMENTED), past_key_values=cache)
    ids = torch.cat([first, torch.tensor([[40, 41]])], dim=1)
    want = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **GREEDY), want)


def test_a_function(route: str) -> None:
    model, inputs, seen = llava(), prompt(ONE, pixels(1)), []

    def loop(
        model: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        extra: int = 0,
        **kwargs: Any,
    ) -> Any:
        seen.append(extra)
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    ocvtp.apply(model, pruner(), keep=KEEP)
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=loop, extra=3), want)
    assert seen == [3]
