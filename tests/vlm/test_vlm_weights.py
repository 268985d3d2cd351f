"""Weights in all ways that ``generate`` decodes: a step says what ``forward`` says of the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessorList, QuantizedCache

import ocvtp
from ocvtp.vlm.call.weighing import attentions_of
from tests.vlm.family import Inputs, assert_rows_answer_alike, by_name, families, joined, steps
from tests.vlm.skips import NATIVE_ROUTE, needs_chunked_prefill, needs_mm_route
from tests.vlm.tiny_llava import (
    GREEDY,
    KEEP,
    MERGED,
    NONE,
    ONE,
    TWO,
    WEIGHED,
    llava,
    mixed,
    pixels,
    prompt,
    text_config,
)

STATIC: Inputs = {"cache_implementation": "static", "disable_compile": True}


@torch.no_grad()
def recomputed(model: Any, row: Inputs, sequences: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Logits ``[1, vocabulary]`` of each step, from the whole sequence so far, without a cache."""
    start = row["input_ids"].shape[1]
    beside = {name: value for name, value in row.items() if name != "input_ids"}
    said = []
    for step in range(count):
        ids = sequences[:, : start + step]
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in row:
                beside[name] = torch.nn.functional.pad(row[name], (0, step))
        said.append(model(input_ids=ids, use_cache=False, **beside).logits[:, -1])
    return said


def assert_recomputed(model: Any, row: Inputs, **options: Any) -> None:
    out = steps(model, row, **options)
    want = recomputed(model, row, out.sequences, len(out.logits))
    for a, b in zip(out.logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, STATIC],
    ids=["dynamic", "no cache", "static"],
)
def test_decoding_is_recomputing(weighed: Any, options: Inputs) -> None:
    row = prompt(TWO, pixels(2))
    assert_recomputed(weighed, row, **options)
    ocvtp.apply(weighed, weighed._ocvtp.settings.selector.pruner, keep=KEEP, **MERGED)
    plain = steps(weighed, row)
    ocvtp.apply(weighed, weighed._ocvtp.settings.selector.pruner, keep=KEEP, **WEIGHED)
    assert (steps(weighed, row).logits[0] - plain.logits[0]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_vl", "llava_next"])
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_decoding_is_recomputing_in_other_families(name: str, options: Inputs, models: Any) -> None:
    family = by_name(name)
    model = models(family)
    ocvtp.apply(model, family.pruner(), keep=family.keep, **WEIGHED)
    for kind in ("two", "video"):
        if kind in family.rows():
            assert_recomputed(model, family.rows()[kind], **options)


def test_a_prefix_lm_decodes_as_without_a_cache(models: Any) -> None:
    """``forward`` would take the answer for a part of the prompt, which is attended to both ways."""
    family = by_name("paligemma")
    model, row = models(family), family.rows()["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep, **WEIGHED)
    want = steps(model, row)
    for options in ({"use_cache": False}, STATIC):
        for a, b in zip(steps(model, row, **options).logits, want.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class _Half(QuantizedCache):
    """A quantised cache whose layers keep half precision in the place of a quantiser's packed numbers."""

    def __init__(self, config: Any) -> None:
        from transformers.cache_utils import Cache, QuantizedLayer

        class Layer(QuantizedLayer):
            def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
                return tensor.half()

            def _dequantize(self, q_tensor: Any) -> torch.Tensor:
                return q_tensor.float()

        Cache.__init__(self, layers=[Layer(residual_length=4) for _ in range(config.num_hidden_layers)])


def test_a_quantised_cache(weighed: Any) -> None:
    row = prompt(TWO, pixels(2))
    cache = _Half(weighed.config.get_text_config())
    out = steps(weighed, row, past_key_values=cache)
    assert cache.layers[0].keys.shape[-2] != cache.get_seq_length()  # the most of it is quantised
    want = recomputed(weighed, row, out.sequences, len(out.logits))
    for a, b in zip(out.logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_chunked_prefill(weighed: Any, options: Inputs) -> None:
    needs_chunked_prefill()
    row = prompt(TWO, pixels(2))
    for chunk in (1, 3, 7, 64):
        assert_recomputed(weighed, row, prefill_chunk_size=chunk, **options)


@pytest.mark.filterwarnings("ignore:.*generation_config")
def test_lookup_and_an_assistant(weighed: Any) -> None:
    row = prompt(TWO, pixels(2))
    torch.manual_seed(5)
    assistant = LlamaForCausalLM(text_config(hidden_size=32)).eval()
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": assistant}):
        if NATIVE_ROUTE == "inputs_embeds":
            with pytest.raises(ValueError, match=r"needs transformers >= 5\.18"):
                steps(weighed, row, **options)
            continue
        assert_recomputed(weighed, row, **options)


@pytest.mark.filterwarnings("ignore:.*generation_config")
def test_a_patched_assistant_has_weights_of_its_own(weighed: Any, oc_pruner: Any) -> None:
    """It is told of the prompt's tokens, not of its pictures, and whatever it guesses, the answer stays."""
    needs_mm_route()
    row = prompt(TWO, pixels(2))
    assistant = llava(seed=1)
    ocvtp.apply(assistant, oc_pruner, keep=KEEP, **WEIGHED)
    want = weighed.generate(**row, **GREEDY)
    assert torch.equal(weighed.generate(**row, **GREEDY, assistant_model=assistant), want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [family.name for family in families()])
@torch.no_grad()
def test_a_padded_batch_is_its_rows(name: str, side: str, models: Any) -> None:
    family = by_name(name)
    model, rows = models(family), list(family.rows().values())
    ocvtp.apply(model, family.pruner(), keep=family.keep, columns=True, **WEIGHED)
    batch = joined(rows, side)
    if side == "left":
        alone = [steps(model, row) for row in rows]
        assert_rows_answer_alike(steps(model, batch), batch["input_ids"].shape[1], alone, rows)
        return
    out = model(**batch)
    for i, row in enumerate(rows):
        want = model(**row).logits[0]
        live = out.columns[i, : row["input_ids"].shape[1]]
        torch.testing.assert_close(out.logits[i, live[live >= 0]], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, STATIC], ids=["dynamic", "no cache", "static"])
def test_beams(weighed: Any, options: Inputs) -> None:
    """Rows of a prompt follow one another, and change places on the way."""
    batch, rows = mixed()
    searched: Inputs = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    out = weighed.generate(**batch, **searched, **options)
    width = batch["input_ids"].shape[1]
    for i, row in enumerate(rows):
        alone = weighed.generate(**row, **searched)
        assert torch.equal(alone[:, row["input_ids"].shape[1] :], out[2 * i : 2 * i + 2, width:])
    scored = weighed.generate(
        **rows[1], **searched, return_dict_in_generate=True, output_scores=True, renormalize_logits=True
    )
    for ids, score in zip(scored.sequences, scored.sequences_scores, strict=True):
        said = torch.cat(recomputed(weighed, rows[1], ids[None], GREEDY["max_new_tokens"])).log_softmax(-1)
        tokens = ids[rows[1]["input_ids"].shape[1] :]
        total = said.gather(1, tokens[:, None]).sum()
        assert float(score * len(tokens)) == pytest.approx(float(total), abs=1e-3)


def test_sampling(weighed: Any) -> None:
    batch, _ = mixed()
    drawn = []
    for options in ({}, STATIC):
        torch.manual_seed(0)
        sampled: Inputs = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2}
        drawn.append(weighed.generate(**batch, **sampled, **options))
    assert torch.equal(*drawn)
    row = prompt(TWO, pixels(2))
    torch.manual_seed(0)
    out = steps_sampled(weighed, row)
    for i in range(2):
        want = recomputed(weighed, row, out.sequences[i : i + 1], len(out.logits))
        for a, b in zip(out.logits, want, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=1e-4, rtol=1e-4)


def steps_sampled(model: Any, row: Inputs) -> Any:
    return model.generate(
        **row,
        do_sample=True,
        max_new_tokens=6,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, 40])
@torch.no_grad()
def test_a_second_prompt_has_no_weights(weighed: Any, negative: int | None, use_cache: bool) -> None:
    """Guidance asks the same model about a text, on a cache of its own or none; it may outgrow the prompt."""
    row = prompt(ONE, pixels(1))
    given: Inputs = {} if negative is None else {"negative_prompt_ids": torch.arange(30, 30 + negative)[None]}
    new = 30 if negative is None else 4
    out = weighed.generate(
        **row,
        **given,
        do_sample=False,
        max_new_tokens=new,
        guidance_scale=2.0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    start = given.get("negative_prompt_ids", row["input_ids"][:, -1:])
    for step, (said, scored) in enumerate(zip(out.logits, out.scores, strict=True)):
        ids = torch.cat([start, out.sequences[:, len(ONE) : len(ONE) + step]], dim=1)
        other = weighed(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)
        want = 2.0 * (said.log_softmax(-1) - other) + other
        torch.testing.assert_close(scored, want, atol=1e-3, rtol=1e-3)


def test_what_has_no_weights_is_untouched(weighed: Any, oc_pruner: Any) -> None:
    """Texts, and pictures that keep all, have the bits that they had, also in the midst of another call."""
    asked: list[tuple[int, torch.Tensor]] = []
    inputs = [prompt(NONE), prompt(TWO, pixels(2))]

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        which, cached = len(asked) % 2, len(asked) % 4 > 1
        if which:
            ocvtp.apply(weighed, oc_pruner, keep=1.0, **WEIGHED)
        asked.append((which, weighed.generate(**inputs[which], **GREEDY, use_cache=cached)))
        return scores

    row = prompt(ONE, pixels(1))
    want = weighed.generate(**row, **GREEDY)
    assert torch.equal(weighed.generate(**row, **GREEDY, logits_processor=LogitsProcessorList([ask])), want)
    ocvtp.remove(weighed)
    plain = [weighed.generate(**each, **GREEDY) for each in inputs]
    assert len(asked) > 3
    assert all(torch.equal(said, plain[which]) for which, said in asked)


# ---------------------------------------------------------------------------------- attention implementations


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """flex attention as plain PyTorch: compiled, it takes half a minute here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:.*flex_attention")
def test_flex_attention(oc_pruner: Any) -> None:
    batch, rows = mixed()
    want = llava("sdpa")
    ocvtp.apply(want, oc_pruner, keep=KEEP, **WEIGHED)
    model = llava("sdpa")
    model.model.language_model.set_attn_implementation("flex_attention")
    assert model.config.text_config._attn_implementation == "flex_attention"
    if NATIVE_ROUTE == "inputs_embeds":
        with pytest.raises(ValueError, match="takes no numbers beside its mask"):
            ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
        return
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    said, told = steps(model, batch), steps(want, batch)
    assert torch.equal(said.sequences, told.sequences)
    for a, b in zip(said.logits, told.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    long = torch.cat([rows[0]["input_ids"], torch.arange(10, 110).repeat(2)[None]], dim=1)
    with torch.no_grad():  # more than a block of keys
        a, b = (each(**{**rows[0], "input_ids": long}).logits for each in (model, want))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_an_implementation_that_takes_no_numbers(oc_pruner: Any) -> None:
    model = llava()
    row = prompt(ONE, pixels(1))
    text = model.config.get_text_config()
    text._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r'flash_attention_2 .*attn_implementation="sdpa".*weigh=False'):
        ocvtp.apply(model, oc_pruner, keep=KEEP, weigh=True)
    assert "forward" not in model.__dict__
    report = ocvtp.apply(model, oc_pruner, keep=KEEP, weigh="auto")
    assert not report.weigh
    assert any('attn_implementation="sdpa"' in reason for reason in report.reasons)
    text._attn_implementation = "sdpa"
    ocvtp.apply(model, oc_pruner, keep=KEEP, weigh=True)
    text._attn_implementation = "eager"
    want = model.generate(**row, **GREEDY)
    text._attn_implementation = "sdpa"
    assert torch.equal(model.generate(**row, **GREEDY), want)
    text._attn_implementation = "flash_attention_2"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"changed to 'flash_attention_2' since ocvtp\.apply"):
            call(**row)
    ocvtp.apply(model, oc_pruner, keep=KEEP, weigh=False)
    assert not any(module._forward_pre_hooks for module in attentions_of(model))


def test_languages_that_pass_nothing_down(oc_pruner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava()
    kind = type(model.model.language_model)

    def closed(self: Any, input_ids: Any = None, attention_mask: Any = None) -> Any:
        raise AssertionError

    monkeypatch.setattr(kind, "forward", closed)
    with pytest.raises(ValueError, match="passes no further arguments down"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, weigh=True)
    monkeypatch.undo()
    for layer in model.model.language_model.layers[:1]:
        layer.mamba = layer.self_attn
        del layer.self_attn
    with pytest.raises(ValueError, match=r"has attention \(self_attn\)"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, weigh=True)
    assert ocvtp.apply(model, oc_pruner, keep=KEEP, weigh="auto").weigh is False


def test_rows_that_are_of_no_prompt(weighed: Any) -> None:
    """A cache whose rows were thinned out by somebody is not taken for another one."""
    with torch.no_grad():
        out = weighed(**mixed()[0], use_cache=True)
    cache = out.past_key_values
    assert isinstance(cache, DynamicCache)
    cache.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="cache holds 2 sequences, the prompt has 1"), torch.no_grad():
        weighed(input_ids=torch.tensor([[5]]), past_key_values=cache)
