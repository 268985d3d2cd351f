"""Weights where layers differ in what they see: Gemma 3 with a window that is shorter than the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import ocvtp
from tests.vlm.families.merged import FAMILIES
from tests.vlm.family import Inputs, joined, steps
from tests.vlm.skips import needs_mm_route
from tests.vlm.standing import nearest
from tests.vlm.test_vlm_gemma3 import builder
from tests.vlm.tiny_llava import IMAGE, WEIGHED

FAMILY = next(family for family in FAMILIES if family.name == "gemma3")
WINDOW, KEPT, NEW = (
    8,
    5,
    14,
)  # the window begins to slide in the prompt, and passes the pictures in the answer
STATIC: Inputs = {"cache_implementation": "static", "disable_compile": True}
ASKED: Inputs = {"do_sample": False, "max_new_tokens": NEW}


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    needs_mm_route()
    return builder(window=WINDOW)(request.param)


def answered(model: Any, row: Inputs, **options: Any) -> Any:
    return model.generate(**row, **ASKED, **options, return_dict_in_generate=True, output_logits=True)


@torch.no_grad()
def by_hand(model: Any, row: Inputs, selected: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Logits ``[n, vocabulary]`` of a pruned prompt and an answer behind it, with masks written in full."""
    pixels, ids = row["pixel_values"], row["input_ids"][0]
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    where = (ids == IMAGE).nonzero()[:, 0].view(len(pixels), -1)
    stays, bias = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids))
    stays[where] = False
    rows = []
    for picture, indices, columns in zip(features, selected, where, strict=True):
        owner = nearest(picture, indices)
        rows += [picture[owner == i].mean(0) for i in range(len(indices))]
        stays[columns[indices]] = True
        bias[columns[indices]] = torch.bincount(owner).float().log()
    short = torch.cat([ids[stays], answer])
    bias = torch.nn.functional.pad(bias[stays], (0, len(answer)))
    embeds = model.get_input_embeddings()(short)
    embeds[short == IMAGE] = torch.stack(rows)
    column, image = torch.arange(len(short)), short == IMAGE
    number = (image & ~torch.nn.functional.pad(image, (1, 0))[:-1]).cumsum(0)
    together = image[:, None] & image & (number[:, None] == number)
    past = column[:, None] - column
    masks = {}
    for kind, far in (("full_attention", len(short)), ("sliding_attention", WINDOW)):
        sees = (past >= 0) & (past < far) | together
        masks[kind] = torch.where(sees, bias, torch.finfo().min)[None, None]
    said: torch.Tensor = model(inputs_embeds=embeds[None], attention_mask=masks, use_cache=False).logits[0]
    return said[-1 - len(answer) :]


@pytest.mark.parametrize(
    "options",
    [{}, STATIC, {"use_cache": False}, {"prefill_chunk_size": 64}, {"prompt_lookup_num_tokens": 2}],
    ids=["dynamic", "static", "no cache", "chunked", "lookup"],
)
@pytest.mark.parametrize("kind", ["one", "two"])
def test_every_layer_sees_the_weights_of_what_it_sees(model: Any, kind: str, options: Inputs) -> None:
    row = FAMILY.rows()[kind]
    ocvtp.apply(model, FAMILY.pruner(), keep=KEPT, **WEIGHED)
    selected = ocvtp.vlm.select(model, row["pixel_values"]).indices
    out = answered(model, row, **options)
    if out.past_key_values is not None:
        assert out.past_key_values.get_seq_length() > WINDOW + NEW
    ocvtp.remove(model)
    answer = out.sequences[0, row["input_ids"].shape[1] :]
    want = by_hand(model, row, selected, answer[:-1])
    torch.testing.assert_close(torch.cat(out.logits), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_padded_batches_and_beams(model: Any, options: Inputs) -> None:
    ocvtp.apply(model, FAMILY.pruner(), keep=KEPT, **WEIGHED)
    rows = list(FAMILY.rows().values())
    batch = joined(rows)
    width = batch["input_ids"].shape[1]
    out = answered(model, batch, **options)
    searched: Inputs = {**ASKED, "num_beams": 3}
    found = model.generate(**batch, **searched, **options)
    for i, row in enumerate(rows):
        alone = answered(model, row)
        for a, b in zip(alone.logits, out.logits, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-4, rtol=1e-4)
        beams = model.generate(**row, **searched)
        assert torch.equal(found[i, width:], beams[0, row["input_ids"].shape[1] :])


def test_a_conversation_behind_the_window(model: Any) -> None:
    """With a text behind it that is longer than the window."""
    row = FAMILY.rows()["two"]
    ocvtp.apply(model, FAMILY.pruner(), keep=KEPT, **WEIGHED)
    cache = DynamicCache(config=model.config.get_text_config())
    first = steps(model, row, past_key_values=cache)
    ids = torch.cat([first.sequences, torch.arange(30, 30 + WINDOW + 3)[None]], dim=1)
    asked: Inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()}
    asked["attention_mask"] = torch.ones_like(ids)
    second = steps(model, asked, past_key_values=cache)
    fresh = steps(model, {**asked, "pixel_values": row["pixel_values"]})
    for a, b in zip(second.logits, fresh.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_decoding_compiled() -> None:
    """Into one graph a step, with a static cache: nothing there asks how far the window has slid."""
    needs_mm_route()
    model, row = builder(window=WINDOW)("sdpa"), FAMILY.rows()["one"]
    ocvtp.apply(model, FAMILY.pruner(), keep=KEPT, **WEIGHED)
    asked: Inputs = {"do_sample": False, "max_new_tokens": 4}
    want = model.generate(**row, **asked)
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    got = model.generate(**row, **asked, cache_implementation="static", compile_config=compiled)
    assert counters["unique_graphs"] > 0
    assert torch.equal(got, want)
    torch._dynamo.reset()
