"""``ocvtp.apply(..., inside=...)``: one patch for what is dropped before and inside the language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.methods.in_llm import FastV, PyramidDrop, SparseVLM
from ocvtp.vlm.call.inside import _crops_by_tokens
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.in_llm import hooks_of, install, uninstall
from tests.vlm.skips import NATIVE_ROUTE, needs_original
from tests.vlm.tiny_inside import (
    DEPTH,
    GREEDY,
    METHODS,
    TOKENS,
    WHOLE,
    batch,
    forced,
    four,
    llava,
    llava_next,
    new,
    ours_on,
    qwen2_5_vl,
    qwen3_vl,
    row,
)

STEPS = torch.randint(2, 110, (4, 3), generator=torch.Generator().manual_seed(8))
FASTV = FastV(2, 6)
ONE = row("llava", 3, 9, seed=1)

methods = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def shared() -> Any:
    return llava()


@pytest.fixture
def model(shared: Any) -> Iterator[Any]:
    yield shared
    ocvtp.remove(shared)
    uninstall(shared)
    assert "forward" not in shared.__dict__
    assert ours_on(shared) == []


def answers(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return new(model.generate(**inputs, **GREEDY, **more), inputs)


# ----------------------------------------------------------------------------- inside alone, and with others


@methods
def test_inside_alone_is_what_the_hooks_do(model: Any, name: str) -> None:
    whole = batch(four("llava"))
    install(model, METHODS[name])
    wanted, said = forced(model, whole, STEPS), answers(model, whole)
    uninstall(model)
    ocvtp.apply(model, None, inside=METHODS[name])
    assert torch.equal(forced(model, whole, STEPS), wanted)
    assert torch.equal(answers(model, whole), said)


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_dropped_is_the_unpatched_model(model: Any, name: str) -> None:
    whole = batch(four("llava"))
    plain = forced(model, whole, STEPS)
    ocvtp.apply(model, None, inside=WHOLE[name])
    assert torch.equal(forced(model, whole, STEPS), plain)
    ocvtp.apply(model, "grid", TOKENS, inside=WHOLE[name], merge="off")
    assert torch.allclose(forced(model, whole, STEPS), plain, atol=1e-4)


@methods
@pytest.mark.parametrize("merge", ["off", "projected"])
def test_after_a_rule_before_it(model: Any, name: str, merge: Any) -> None:
    rows = four("llava")
    whole = batch(rows)
    ocvtp.apply(model, "grid", 8, merge=merge, inside=METHODS[name])
    hooks = hooks_of(model)
    hooks.seen = []
    both = answers(model, whole)
    assert hooks.seen[0].rows.present == (8, 8, 0, 16)
    for more in ({}, {"num_beams": 2}):
        alone = [answers(model, batch([one]), **more) for one in rows]
        assert torch.equal(answers(model, whole, **more), torch.cat(alone))
    hooks.seen = None
    assert both.shape == (4, GREEDY["max_new_tokens"])


def test_after_a_rule_before_it_by_either_way_to_hand_rows_over(
    model: Any, route: str, positions: Any
) -> None:
    whole = batch(four("llava"))
    ocvtp.apply(model, "grid", 8, positions, merge="off", inside=FASTV)
    hooks = hooks_of(model)
    hooks.seen = []
    answers(model, whole)
    model(**whole)
    hooks.seen, seen = None, hooks.seen
    assert [one.rows.present for one in seen] == [(8, 8, 0, 16)] * 2
    alone = [model(**batch([one])).logits[:, -1] for one in four("llava")]
    if positions == "compact":  # forward counts the columns of a batch, padding or not
        assert torch.allclose(model(**batch([ONE])).logits[:, -1], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("build", "family", "method"),
    [
        (llava_next, "llava_next", METHODS["sparsevlm"]),
        (qwen2_5_vl, "qwen2_5_vl", METHODS["pyramiddrop"]),
        (qwen3_vl, "qwen3_vl", FastV(3, 6)),
    ],
)
def test_other_families(build: Any, family: str, method: Any) -> None:
    model, rows = build(), four(family)
    whole = batch(rows)
    plain = answers(model, whole)
    for pruner, more in ((None, {}), ("grid", {"keep": 8, "merge": "off"})):
        try:
            ocvtp.apply(model, pruner, **more, inside=method)
        except ValueError as error:  # Qwen3-VL before transformers 5.18
            pytest.skip(str(error))
        alone = [answers(model, batch([one])) for one in rows]
        assert torch.equal(answers(model, whole), torch.cat(alone))
        assert not torch.equal(answers(model, whole), plain)
    ocvtp.remove(model)
    assert torch.equal(answers(model, whole), plain)


# --------------------------------------------------------------------------------- putting on and taking off


def test_one_patch_is_put_on_exchanged_and_taken_off(model: Any) -> None:
    inputs = batch([ONE])
    plain = model(**inputs).logits
    ocvtp.apply(model, None, inside=FASTV)
    first = hooks_of(model)
    short = model(**inputs).logits
    assert short.shape[1] == plain.shape[1] - TOKENS + 6
    ocvtp.apply(model, None, inside=FASTV)
    assert hooks_of(model) is first
    ocvtp.apply(model, None, inside=FastV(2, 3))
    assert model(**inputs).logits.shape[1] == plain.shape[1] - TOKENS + 3
    ocvtp.apply(model, "grid", 8)
    assert hooks_of(model) is None
    assert model(**inputs).logits.shape[1] == plain.shape[1] - TOKENS + 8
    ocvtp.apply(model, "grid", 8, inside=FASTV)
    assert model(**inputs).logits.shape[1] == plain.shape[1] - TOKENS + 6
    ocvtp.remove(model)
    assert hooks_of(model) is None
    assert torch.equal(model(**inputs).logits, plain)


def test_pruned_gives_back_what_was_there(model: Any) -> None:
    inputs = batch([ONE])
    plain = model(**inputs).logits
    with ocvtp.pruned(model, None, inside=FASTV):
        short = model(**inputs).logits
    assert hooks_of(model) is None
    assert torch.equal(model(**inputs).logits, plain)
    ocvtp.apply(model, None, inside=FASTV)
    with ocvtp.pruned(model, "grid", 8):
        assert hooks_of(model) is None
    assert torch.equal(model(**inputs).logits, short)


def test_a_refused_apply_changes_nothing(model: Any) -> None:
    inputs = batch([ONE])
    ocvtp.apply(model, None, inside=FASTV)
    short = model(**inputs).logits
    with pytest.raises(ValueError, match="the language model has 6"):
        ocvtp.apply(model, None, inside=FastV(DEPTH + 2, 6))
    assert torch.equal(model(**inputs).logits, short)


def test_a_copy_is_pruned_by_itself() -> None:
    model, inputs = llava(), batch([ONE])
    plain = model(**inputs).logits
    ocvtp.apply(model, "grid", 8, inside=FASTV)
    short = model(**inputs).logits
    twin = copy.deepcopy(model)
    ocvtp.remove(model)
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(twin(**inputs).logits, short)
    ocvtp.remove(twin)
    assert torch.equal(twin(**inputs).logits, plain)


def test_hooks_of_the_low_level_are_others(model: Any) -> None:
    install(model, FASTV)
    with pytest.raises(PatchError, match="uninstall"):
        ocvtp.apply(model, None, inside=FASTV)
    ocvtp.apply(model, "grid", 8, weigh=False)  # and stay beside a patch without
    a = model(**batch([ONE])).logits
    ocvtp.remove(model)
    assert hooks_of(model) is not None
    uninstall(model)
    ocvtp.apply(model, "grid", 8, inside=FASTV)
    assert torch.equal(model(**batch([ONE])).logits, a)


def test_state_and_saving_know_nothing_of_it(model: Any) -> None:
    before = list(model.state_dict())
    ocvtp.apply(model, None, inside=FASTV)
    assert list(model.state_dict()) == before


# --------------------------------------------------------------------------------------------------- reports


def test_the_report_says_what_is_left(model: Any) -> None:
    report = ocvtp.apply(model, None, inside=FastV(2, 6))
    assert (report.selector, report.tokens_before, report.tokens_after) == ("nobody", TOKENS, TOKENS)
    text = str(report)
    assert "FastV before layer 2, positions kept" in text
    assert "16 -> 6; its 6 layers get 9.3 on average (58.3%), 7.7 leave them" in text
    report = ocvtp.apply(model, "grid", 8, inside=PyramidDrop((2, 4), (0.5, 0.25)))
    assert "PyramidDrop before layers 2, 4, positions renumbered" in str(report)
    assert "8 -> 4 -> 2" in str(report)
    assert not report.weigh
    assert any("layers behind a cut inside hold fewer" in reason for reason in report.reasons)
    assert ocvtp.apply(model, "grid", 8).inside == ()


def test_adaptations_are_said_to_be_ours() -> None:
    needs_original()  # as Qwen-VL does
    model = qwen2_5_vl()
    report = str(ocvtp.apply(model, None, inside=SparseVLM((1, 2, 4), (10, 7, 4))))
    assert "positions kept" in report
    assert "on qwen2_5_vl our adaptation" in report
    assert "adaptation" not in str(ocvtp.apply(model, None, inside=FASTV))


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"pruner": None}, TypeError, "say what does inside"),
        ({"pruner": None, "keep": 8, "inside": FASTV}, ValueError, "keep: for a pruner"),
        ({"pruner": "grid", "keep": 8, "inside": "fastv"}, TypeError, "ocvtp.methods.in_llm"),
        ({"pruner": "grid", "keep": 8, "inside": FASTV, "columns": True}, ValueError, "columns=False"),
        ({"pruner": "grid", "keep": 8, "inside": FASTV, "weigh": True}, ValueError, "weigh=False"),
    ],
)
def test_what_does_not_go_together(model: Any, given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ocvtp.apply(model, **given)


@pytest.mark.parametrize("pruner", [None, "grid"])
def test_calls_that_cannot_work_are_refused_in_words(model: Any, pruner: Any) -> None:
    inputs = batch([ONE])
    ocvtp.apply(model, pruner, **({} if pruner is None else {"keep": 8}), inside=FASTV)
    with pytest.raises(ValueError, match="labels"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=8)
    with pytest.raises(ValueError, match="paged"):
        model.generate(**inputs, **GREEDY, cache_implementation="paged")
    with pytest.raises(PatchError, match="fewer columns"):
        model.model(**inputs)
    text = batch([row("llava", 9, 9, images=0)])
    assert model(**text, labels=text["input_ids"]).loss > 0
    if pruner is None:
        with pytest.raises(PatchError, match="nothing is chosen"):
            ocvtp.vlm.select(model, inputs["pixel_values"])


@methods
@pytest.mark.parametrize("pruner", [None, "grid"])
def test_without_a_cache_the_prompt_decides_every_time(model: Any, name: str, pruner: Any) -> None:
    inputs = batch([ONE])
    ocvtp.apply(model, pruner, **({} if pruner is None else {"keep": 8}), inside=METHODS[name])
    assert torch.equal(answers(model, inputs, use_cache=False), answers(model, inputs))


@methods
def test_prompt_lookup_answers_as_greedy_does(model: Any, name: str) -> None:
    """Its first call has drafts behind the prompt, which must not be taken for its last token."""
    ids = [11, 12, 13, 14] * 3 + ONE["ids"] + [11, 12, 13, 14, 11, 12, 13, 14, 11, 12, 13, 11, 12]
    inputs = batch([{**ONE, "ids": ids}])
    asked = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    for pruner, more in ((None, {}), ("grid", {"keep": 8})):
        ocvtp.apply(model, pruner, **more, inside=METHODS[name])
        if not _crops_by_tokens() or (pruner and NATIVE_ROUTE != "mm_encoder_outputs"):
            with pytest.raises(ValueError, match=r"newer transformers|>= 5.18"):
                answers(model, inputs, **asked)
            return
        assert torch.equal(answers(model, inputs, **asked), answers(model, inputs))


@methods
@pytest.mark.parametrize("pruner", [None, "grid"])
def test_a_second_turn_through_generate(model: Any, name: str, pruner: Any) -> None:
    inputs = batch([ONE])
    ocvtp.apply(model, pruner, **({} if pruner is None else {"keep": 8}), inside=METHODS[name])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    more = torch.randint(2, 110, (1, 5), generator=torch.Generator().manual_seed(1))
    turn = torch.cat([first.sequences, more], dim=1)
    kept = copy.deepcopy(first.past_key_values)
    mask = torch.ones_like(turn)
    whole = model.generate(turn, past_key_values=first.past_key_values, attention_mask=mask, **GREEDY)
    ids, found = turn[:, first.sequences.shape[1] - 1 :], []
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(input_ids=ids, past_key_values=kept, attention_mask=mask).logits[:, -1]
        ids, mask = logits.argmax(-1, keepdim=True), torch.nn.functional.pad(mask, (0, 1), value=1)
        found.append(ids)
    assert torch.equal(whole[:, turn.shape[1] :], torch.cat(found, 1))
