"""Every logits processor and stopping criterion of transformers, built by the caller for the long prompt."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import (
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    WatermarkingConfig,
)

import ocvtp
from ocvtp.vlm.call.callbacks import LongView
from tests.vlm.library_callbacks import CRITERIA, END, OTHERS, PROCESSORS, SAID, Asked, classes
from tests.vlm.skips import needs_mm_route
from tests.vlm.tiny_llava import KEEP, ONE, VOCAB, llava, mixed, pixels, prompt, pruner

CLASSES = classes()
HERE = [name for name in (*PROCESSORS, *CRITERIA) if name in CLASSES]


class Script:
    """In the place of a language model's head: what it says depends on the number of the call alone."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.rand(64, VOCAB, generator=generator)
        for step, token in enumerate(SAID):
            self.table[step, token] = 4.0
            self.table[step, 26 + step] = 3.0
        self.calls = 0

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.table[self.calls - 1].expand_as(output).clone()


@pytest.fixture(scope="module")
def scripted() -> tuple[Any, Script]:
    model, script = llava(), Script()
    model.lm_head.register_forward_hook(script)
    return model, script


def said(scripted: tuple[Any, Script], inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    """The new tokens of every row."""
    model, script = scripted
    script.calls = 0
    torch.manual_seed(0)
    out = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": len(SAID), **options})
    found = out if isinstance(out, torch.Tensor) else out.sequences
    assert torch.equal(found[0, : inputs["input_ids"].shape[1]], inputs["input_ids"][0])
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def argument(name: str, made: Any) -> dict[str, Any]:
    return {"logits_processor" if name in PROCESSORS else "stopping_criteria": [made]}


def test_no_class_is_forgotten() -> None:
    """A new version of transformers may bring a class: say in ``library_callbacks`` how it is built."""
    assert set(CLASSES) <= {*PROCESSORS, *CRITERIA, *OTHERS}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", HERE)
def test_built_for_the_long_prompt(scripted: tuple[Any, Script], name: str, beams: int) -> None:
    entry = {**PROCESSORS, **CRITERIA}[name]
    if beams > 1 and not entry.beams:
        pytest.skip("not for beams")
    model = scripted[0]
    inputs = prompt(ONE, pixels(1))
    asked = Asked(inputs["input_ids"], model, beams)
    options = {**entry.options, "num_beams": beams}
    without = said(scripted, inputs, **options)
    used = entry.build(CLASSES[name], asked)
    want = said(scripted, inputs, **options, **argument(name, used))
    if entry.changes and beams == 1:
        assert want != without
    with ocvtp.pruned(model, pruner(), keep=KEEP):
        again = entry.build(CLASSES[name], asked)
        assert said(scripted, inputs, **options, **argument(name, again)) == want
    assert _plain(entry.state(again)) == _plain(entry.state(used))


def _plain(state: Any) -> Any:
    return state.tolist() if isinstance(state, torch.Tensor) else state


#: What ``generate`` makes of its own, and the caller's of the same class.
BOTH: dict[str, tuple[dict[str, Any], Any]] = {
    "MinLengthLogitsProcessor": ({"min_length": len(ONE) + 9}, lambda c, a: c(a.length + 1, END)),
    "MinNewTokensLengthLogitsProcessor": ({"min_new_tokens": 2}, lambda c, a: c(a.length, 9, END)),
    "RepetitionPenaltyLogitsProcessor": (
        {"repetition_penalty": 5.0},
        lambda c, a: c(5.0, prompt_ignore_length=a.length),
    ),
    "NoRepeatNGramLogitsProcessor": ({"no_repeat_ngram_size": 2}, lambda c, a: c(50)),
    "EncoderRepetitionPenaltyLogitsProcessor": (
        {"encoder_repetition_penalty": 0.2},
        lambda c, a: c(0.2, torch.tensor([[7]])),
    ),
    "SequenceBiasLogitsProcessor": ({"sequence_bias": [[[31], -50.0]]}, lambda c, a: c([[[30], -50.0]])),
    "ForcedEOSTokenLogitsProcessor": ({"forced_eos_token_id": 50}, lambda c, a: c(a.length + 4, END)),
    "ExponentialDecayLengthPenalty": (
        {"exponential_decay_length_penalty": (1, 3.0)},
        lambda c, a: c((4, 3.0), END, a.length),
    ),
    "SuppressTokensAtBeginLogitsProcessor": (
        {"begin_suppress_tokens": [30]},
        lambda c, a: c([30], a.length + 2),
    ),
    "MaxLengthCriteria": ({}, lambda c, a: c(a.length + 3)),
    "EosTokenCriteria": ({}, lambda c, a: c(8)),
}


@pytest.mark.parametrize("name", BOTH)
def test_replaces_what_generate_makes_of_the_same_type(scripted: tuple[Any, Script], name: str) -> None:
    if name.startswith("Encoder"):
        needs_mm_route()  # without it, generate makes none beside embeddings
    options, build = BOTH[name]
    options = {"eos_token_id": END, **options}
    model = scripted[0]
    inputs = prompt(ONE, pixels(1))
    asked = Asked(inputs["input_ids"], model)
    alone = said(scripted, inputs, **options)
    want = said(scripted, inputs, **options, **argument(name, build(CLASSES[name], asked)))
    assert want != alone
    with ocvtp.pruned(model, pruner(), keep=KEEP):
        assert said(scripted, inputs, **options, **argument(name, build(CLASSES[name], asked))) == want
        before = dict(vars(model))
    assert "_merge_criteria_processor_list" not in before


#: What ``generate`` makes of its options, by itself.
OWN: list[dict[str, Any]] = [
    {"min_length": len(ONE) + 9},
    {"min_new_tokens": 9},
    {"max_length": len(ONE) + 4, "max_new_tokens": None},
    {"repetition_penalty": 5.0},
    {"encoder_repetition_penalty": 0.2},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"sequence_bias": [[[8, 9, 30], -50.0]]},
    {"bad_words_ids": [[9, 30]]},
    {"forced_eos_token_id": END, "max_length": len(ONE) + 5, "max_new_tokens": None},
    {"exponential_decay_length_penalty": (2, 30.0)},
    {"begin_suppress_tokens": [30]},
    {"suppress_tokens": [31]},
    {"guidance_scale": 3.0},
    {"prefix_allowed_tokens_fn": lambda row, ids: [40 + len(ids) - len(ONE)]},
    {"watermarking_config": WatermarkingConfig(bias=20.0)},
]


@pytest.mark.parametrize("options", OWN, ids=lambda options: next(iter(options)))
def test_what_generate_makes_by_itself(
    scripted: tuple[Any, Script], route: str, options: dict[str, Any]
) -> None:
    inputs = prompt(ONE, pixels(1))
    options = {"eos_token_id": END, **options}
    want = said(scripted, inputs, **options)
    assert want != said(scripted, inputs, eos_token_id=END)
    with ocvtp.pruned(scripted[0], pruner(), keep=KEEP):
        if route == "inputs_embeds" and any(name.startswith("encoder_") for name in options):
            with pytest.raises(ValueError, match=r"encoder_\w+ with .* transformers >= 5\.18"):
                said(scripted, inputs, **options)
        else:
            assert said(scripted, inputs, **options) == want


def test_rows_and_their_copies(scripted: tuple[Any, Script]) -> None:
    """Prompts of a batch, each sampled twice."""
    inputs = mixed()[0]
    asked = Asked(inputs["input_ids"], scripted[0])
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    build = PROCESSORS["PrefixConstrainedLogitsProcessor"].build
    constrained = build(CLASSES["PrefixConstrainedLogitsProcessor"], asked)
    for callback in (
        {"logits_processor": [constrained]},
        {"prefix_allowed_tokens_fn": constrained._prefix_allowed_tokens_fn},
    ):
        want = said(scripted, inputs, **options, **callback)
        assert len({tuple(row) for row in want}) > 1
        with ocvtp.pruned(scripted[0], pruner(), keep=KEEP):
            assert said(scripted, inputs, **options, **callback) == want


def test_state_and_class_stay_the_callers(scripted: tuple[Any, Script]) -> None:
    """A subclass with state, seen through by ``isinstance``, and changed by what it does."""

    class Counting(MinLengthLogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.lengths = [*getattr(self, "lengths", []), input_ids.shape[1]]
            return super().__call__(input_ids, scores)

    counting = Counting(len(ONE) + 9, END)
    with ocvtp.pruned(scripted[0], pruner(), keep=KEEP):
        got = said(scripted, prompt(ONE, pixels(1)), eos_token_id=END, logits_processor=[counting])
    assert END not in got[0][:9]
    assert counting.calls == len(SAID)
    assert counting.lengths == [len(ONE) + step for step in range(len(SAID))]
    shown = LongView(torch.tensor([ONE]), 10).processor(counting)
    assert isinstance(shown, Counting)
    shown.extra = 3
    assert counting.extra == 3
    assert copy.deepcopy(shown).calls == counting.calls


def test_a_stopping_list_tells_generate_its_own_length() -> None:
    """A deferred stop compares that number with the short sequence."""
    view = LongView(torch.tensor([ONE]), 10)
    listed = StoppingCriteriaList([view.criterion(MaxLengthCriteria(len(ONE) + 5))])
    assert listed.max_length == 15
    assert not listed(torch.zeros(1, 14, dtype=torch.long), None)
    assert listed(torch.zeros(1, 15, dtype=torch.long), None)


def test_a_minimum_length_is_kept_from_assistants(oc_pruner: Any) -> None:
    needs_mm_route()
    model = llava()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    inputs = prompt(ONE, pixels(1))
    end = int(model.generate(**inputs, do_sample=False, max_new_tokens=1)[0, -1])
    options = {
        "do_sample": False,
        "max_new_tokens": 6,
        "eos_token_id": end,
        "logits_processor": [MinLengthLogitsProcessor(len(ONE) + 4, end)],
    }
    want = model.generate(**inputs, **options)
    assert want.shape[1] >= len(ONE) + 4
    assert torch.equal(model.generate(**inputs, **options, assistant_model=llava(seed=7)), want)


def test_two_threads_compare_on_one_model(oc_pruner: Any) -> None:
    model = llava()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    inputs = prompt(ONE, pixels(1))
    options = {"do_sample": False, "max_new_tokens": 6}
    found: list[int] = []

    def work(more: int) -> None:
        for _ in range(4):
            stop = MaxLengthCriteria(len(ONE) + more)
            found.append(model.generate(**inputs, **options, stopping_criteria=[stop]).shape[1] - more)

    threads = [threading.Thread(target=work, args=(more,)) for more in (2, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [len(ONE)] * 8
    assert "_merge_criteria_processor_list" not in vars(model)
