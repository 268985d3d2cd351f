"""``generate`` in all its modes, on the pruned prompt."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import ocvtp
from ocvtp.vlm.towers.clip import root
from tests.vlm.skips import needs_chunked_prefill, needs_mm_route, needs_original
from tests.vlm.tiny_llava import (
    GREEDY,
    IMAGE,
    KEEP,
    ONE,
    PAD,
    TOKENS,
    TWO,
    llava,
    mixed,
    pad,
    pixels,
    prompt,
    text_config,
)

DROPPED = TOKENS - KEEP


@pytest.fixture
def patched(model: Any, oc_pruner: Any, positions: str) -> Any:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    return model


@pytest.fixture
def one() -> dict[str, torch.Tensor]:
    return prompt(ONE, pixels(1))


@pytest.fixture
def compact(model: Any, oc_pruner: Any) -> Any:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    return model


def test_beams_in_a_batch_equal_beams_alone(route: str, model: Any, oc_pruner: Any, positions: str) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    batch, rows = mixed()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    out = model.generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    assert out.shape == (6, width + GREEDY["max_new_tokens"])
    assert torch.equal(out[:, :width], batch["input_ids"].repeat_interleave(2, 0))
    for i, row in enumerate(rows):
        alone = model.generate(**row, **options)
        assert torch.equal(alone[:, row["input_ids"].shape[1] :], out[2 * i : 2 * i + 2, width:])


def test_sampling_keeps_the_random_stream(route: str, model: Any, oc_pruner: Any) -> None:
    # One image per row: transformers < 5.18 hands copies of a row the wrong images when rows have several.
    batch = {**pad([ONE, [1, 2, *ONE]]), "pixel_values": pixels(2)}
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5}
    torch.manual_seed(0)
    want = model.generate(**batch, **options)
    ocvtp.apply(model, oc_pruner, keep=TOKENS)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**batch, **options), want)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    torch.manual_seed(0)
    pruned = model.generate(**batch, **options)
    assert pruned.shape == want.shape
    assert not torch.equal(pruned, want)


def test_static_cache_equals_dynamic(route: str, model: Any, oc_pruner: Any, positions: str) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    batch, rows = mixed()
    want = model.generate(**batch, **GREEDY)
    options = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**batch, **options), want)
    # The model keeps its static cache; a note left on it must not reach the next calls.
    again = model.generate(**batch, **options, return_dict_in_generate=True).sequences
    assert torch.equal(again, want)
    text = model.generate(**rows[2], **options)
    assert torch.equal(text, model.generate(**rows[2], **GREEDY))


@pytest.mark.parametrize("width", [48, 32])
def test_assistant_equals_greedy(patched: Any, one: dict[str, torch.Tensor], width: int) -> None:
    needs_mm_route()
    want = patched.generate(**one, **GREEDY)
    torch.manual_seed(5)
    assistant = LlamaForCausalLM(text_config(hidden_size=width)).eval()
    assert torch.equal(patched.generate(**one, **GREEDY, assistant_model=assistant), want)


@pytest.mark.parametrize("patch_assistant", [False, True])
def test_vlm_assistant_equals_greedy(
    patched: Any, one: dict[str, torch.Tensor], oc_pruner: Any, patch_assistant: bool
) -> None:
    needs_mm_route()
    want = patched.generate(**one, **GREEDY)
    assistant = llava(seed=7)
    if patch_assistant:
        ocvtp.apply(assistant, oc_pruner, keep=KEEP)
    assert torch.equal(patched.generate(**one, **GREEDY, assistant_model=assistant), want)


def test_prompt_lookup_equals_greedy(patched: Any) -> None:
    needs_mm_route()
    inputs = prompt([1, 7, 8, 9, 7, 8, *[IMAGE] * TOKENS, 7, 8], pixels(1))
    want = patched.generate(**inputs, **GREEDY)
    assert torch.equal(patched.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), want)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_chunked_prefill_equals_greedy(patched: Any, chunk: int) -> None:
    needs_chunked_prefill()
    inputs = prompt(TWO, pixels(2))
    want = patched.generate(**inputs, **GREEDY)
    assert torch.equal(patched.generate(**inputs, **GREEDY, prefill_chunk_size=chunk), want)


def test_the_old_route_refuses_what_it_cannot_do(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ocvtp.vlm.resolving.route_of", lambda model: "inputs_embeds")
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assistant = LlamaForCausalLM(text_config()).eval()
    for options in (
        {"assistant_model": assistant},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
    ):
        with pytest.raises(ValueError, match=r"transformers >= 5\.18"):
            model.generate(**one, **options)


def test_max_length_counts_the_long_prompt(compact: Any, one: dict[str, torch.Tensor]) -> None:
    long = len(ONE) + 4
    assert compact.generate(**one, max_length=long, do_sample=False).shape[1] == long
    config = GenerationConfig(max_length=long, do_sample=False)
    assert compact.generate(**one, generation_config=config).shape[1] == long
    assert config.max_length == long  # the user's own
    # Far enough that new tokens outweigh a mistake of the dropped columns.
    assert compact.generate(**one, max_length=len(ONE) + 20, do_sample=False).shape[1] == len(ONE) + 20
    both = compact.generate(**one, generation_config=config, max_new_tokens=7)
    assert both.shape[1] == len(ONE) + 7
    assert compact.generate(**one, do_sample=False).shape[1] == len(ONE) + 20  # the default: 20 new tokens


def test_the_models_own_max_length_means_what_it_did(compact: Any, one: dict[str, torch.Tensor]) -> None:
    compact.generation_config.max_length = len(ONE) + 3
    pruned = compact.generate(**one, do_sample=False)
    with_config = compact.generate(**one, generation_config=GenerationConfig(do_sample=False))
    ocvtp.remove(compact)
    assert pruned.shape == compact.generate(**one, do_sample=False).shape
    assert with_config.shape == pruned.shape
    assert compact.generation_config.max_length == len(ONE) + 3


def test_min_length_counts_the_long_prompt(compact: Any, one: dict[str, torch.Tensor]) -> None:
    first = int(compact.generate(**one, max_new_tokens=1, do_sample=False)[0, -1])
    stop = {"eos_token_id": first, "do_sample": False, "max_new_tokens": 8}
    assert compact.generate(**one, **stop).shape[1] == len(ONE) + 1
    longer = compact.generate(**one, **stop, min_length=len(ONE) + 3)
    assert first not in longer[0, len(ONE) : len(ONE) + 3].tolist()
    # Had min_length kept counting, the short prompt would postpone the end by the dropped tokens.
    assert compact.generate(**one, **stop, min_length=len(ONE)).shape[1] == len(ONE) + 1
    config = GenerationConfig(**stop, min_length=len(ONE))
    assert compact.generate(**one, generation_config=config).shape[1] == len(ONE) + 1
    assert config.min_length == len(ONE)


class Recorder(StoppingCriteria):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        stop = len(self.seen) == 3
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool)


class RecordingProcessor(LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores


@pytest.mark.parametrize("beams", [1, 2])
def test_callbacks_see_the_long_prompt(compact: Any, beams: int) -> None:
    criterion, processor, prefixes = Recorder(), RecordingProcessor(), []

    def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        prefixes.append((batch_id, input_ids.clone()))
        return list(range(1, 100))

    batch, _ = mixed()
    out = compact.generate(
        **batch,
        **GREEDY,
        num_beams=beams,
        stopping_criteria=StoppingCriteriaList([criterion]),
        logits_processor=LogitsProcessorList([processor]),
        prefix_allowed_tokens_fn=allowed,
    )
    width = batch["input_ids"].shape[1]
    assert out.shape[1] == width + 3  # the criterion ended it
    for seen, first in ((criterion.seen, 1), (processor.seen, 0)):
        assert [s.shape[1] for s in seen[:3]] == [width + first + i for i in range(3)]
        for s in seen:  # beam search asks about all its candidates
            copies = s.shape[0] // 3
            assert copies >= beams
            assert torch.equal(s[:, :width], batch["input_ids"].repeat_interleave(copies, 0))
    if beams == 1:
        assert torch.equal(criterion.seen[-1], out)
    for batch_id, ids in prefixes:
        assert torch.equal(ids[:width], batch["input_ids"][batch_id])
    assert max(out[:, width:].flatten().tolist()) < 100


def test_plain_lists_and_library_criteria(compact: Any, one: dict[str, torch.Tensor]) -> None:
    stop = MaxLengthCriteria(max_length=len(ONE) + 2)
    out = compact.generate(**one, **GREEDY, stopping_criteria=[stop])
    assert out.shape[1] == len(ONE) + 2  # replaces generate's own, as upstream
    assert stop.max_length == len(ONE) + 2
    # Also where it is the more generous one of the two.
    stop = MaxLengthCriteria(max_length=len(ONE) + 9)
    out = compact.generate(**one, **GREEDY, stopping_criteria=[stop])
    ocvtp.remove(compact)
    assert out.shape == compact.generate(**one, **GREEDY, stopping_criteria=[stop]).shape
    assert out.shape[1] == len(ONE) + 9


class Collector:
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamers_get_the_long_prompt_first(compact: Any, one: dict[str, torch.Tensor]) -> None:
    streamer = Collector()
    out = compact.generate(**one, **GREEDY, streamer=streamer)
    assert streamer.puts[0] == ONE
    assert [token for put in streamer.puts for token in put] == out[0].tolist()
    assert streamer.ended


def test_model_output_gets_the_long_prompt(patched: Any, one: dict[str, torch.Tensor]) -> None:
    want = patched.generate(**one, **GREEDY)
    out = patched.generate(**one, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, want)
    assert len(out.scores) == GREEDY["max_new_tokens"]
    assert torch.equal(out.sequences[0, : len(ONE)], one["input_ids"][0])


def test_pad_ids_without_a_mask_are_padding(patched: Any) -> None:
    batch, _ = mixed()
    want = patched.generate(**batch, **GREEDY)
    del batch["attention_mask"]
    assert torch.equal(patched.generate(**batch, **GREEDY), want)
    # As upstream: a pad id that also ends sequences says nothing.
    ambiguous = patched.generate(**batch, **{**GREEDY, "eos_token_id": PAD})
    width = batch["input_ids"].shape[1]
    assert not torch.equal(ambiguous[0, width : width + 3], want[0, width : width + 3])


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_a_cache(patched: Any, use_cache: bool) -> None:
    inputs = prompt(TWO, pixels(2))
    want = patched.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    got = patched.generate(
        **inputs, **GREEDY, return_dict_in_generate=True, output_logits=True, use_cache=use_cache
    )
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_padding_to_a_multiple(route: str, model: Any, oc_pruner: Any) -> None:
    padded = pad([[PAD] * 5 + ONE])
    padded["attention_mask"][:, :5] = 0
    inputs = {**padded, "pixel_values": pixels(1)}
    want = model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        want_logits = model(**inputs).logits
    ocvtp.apply(model, oc_pruner, keep=TOKENS)
    assert torch.equal(model.generate(**inputs, **GREEDY), want)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want_logits)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    got = model.generate(**inputs, **GREEDY)
    alone = model.generate(**prompt(ONE, inputs["pixel_values"]), **GREEDY)
    assert torch.equal(got[0, -GREEDY["max_new_tokens"] :], alone[0, -GREEDY["max_new_tokens"] :])


def test_positional_and_renamed_inputs(compact: Any, one: dict[str, torch.Tensor]) -> None:
    want = compact.generate(**one, **GREEDY)
    images = one["pixel_values"]
    assert torch.equal(compact.generate(one["input_ids"], pixel_values=images, **GREEDY), want)
    assert torch.equal(compact.generate(inputs=one["input_ids"], pixel_values=images, **GREEDY), want)
    config = GenerationConfig(**GREEDY)
    assert torch.equal(compact.generate(one["input_ids"], config, pixel_values=images), want)
    with pytest.raises(ValueError, match="not allowed"):
        compact.generate(one["input_ids"], input_ids=one["input_ids"], pixel_values=images)


def test_own_position_ids_are_kept(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    needs_original()
    ids = torch.arange(len(ONE))[None]
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions="original")
    want = model.generate(**one, **GREEDY)
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions="compact")
    assert torch.equal(model.generate(**one, **GREEDY, position_ids=ids), want)
    with pytest.raises(ValueError, match="position_ids must have the shape"):
        model.generate(**one, **GREEDY, position_ids=ids[:, :-1])


def test_two_threads_on_one_model(compact: Any) -> None:
    jobs = [prompt(ONE, pixels(1, seed=s)) for s in (1, 2)]
    want = [compact.generate(**job, **GREEDY) for job in jobs]
    assert not torch.equal(want[0], want[1])
    got: list[list[torch.Tensor]] = [[], []]

    def work(i: int) -> None:
        for _ in range(4):
            got[i].append(compact.generate(**jobs[i], **GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(got[i]) == 4
        assert all(torch.equal(out, want[i]) for out in got[i])


def test_an_exception_leaves_the_next_call_right(compact: Any, one: dict[str, torch.Tensor]) -> None:
    want = compact.generate(**one, **GREEDY)
    state = copy.copy(compact.__dict__)

    class Fault(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Fault

    for place in (
        root(compact.model.vision_tower).encoder.layers[3],
        compact.model.multi_modal_projector,
        compact.model.language_model.layers[1],
    ):
        handle = place.register_forward_hook(fail)
        with pytest.raises(Fault):
            compact.generate(**one, **GREEDY)
        handle.remove()
        assert torch.equal(compact.generate(**one, **GREEDY), want)
    assert compact.__dict__.keys() == state.keys()
