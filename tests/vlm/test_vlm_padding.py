"""Rows that end in padding keep it there, and outputs say where the caller's columns went."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm import lengthen
from tests.vlm.family import Family, Inputs, families, numberings
from tests.vlm.tiny_llava import GREEDY, KEEP, NONE, ONE, PAD, TOKENS, TWO, mixed, pixels, prompt

CASES = [pytest.param(family, id=family.name) for family in families()]
ANSWERS = [[31, 32, 33, 34, 35], [36, 37], [38, 39, 40], [41, 42, 43, 44]]
WIDE = 5  # the longest answer


@functools.cache
def _rows(family: Family) -> list[Inputs]:
    return list(family.rows().values())


def answered(row: Inputs, answer: list[int], width: int | None = None) -> Inputs:
    """A prompt with an answer behind it, padded on the right to ``width`` tokens of answer."""
    gap = (width or len(answer)) - len(answer)
    new = torch.tensor([answer + [PAD] * gap])
    made = {**row, "input_ids": torch.cat([row["input_ids"], new], 1)}
    mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))
    made["attention_mask"] = torch.cat([mask, torch.tensor([[1] * len(answer) + [0] * gap])], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in row:
            made[name] = torch.cat([row[name], torch.zeros_like(new)], 1)
    return made


def online(family: Family) -> tuple[Inputs, list[Inputs]]:
    """Prompts padded on the left with answers padded on the right, and the rows one by one."""
    rows = _rows(family)
    batch = family.batch()
    answers = ANSWERS[: len(rows)]
    new = torch.tensor([answer + [PAD] * (WIDE - len(answer)) for answer in answers])
    live = torch.tensor([[1] * len(answer) + [0] * (WIDE - len(answer)) for answer in answers])
    for name, more in (("input_ids", new), ("attention_mask", live)):
        batch[name] = torch.cat([batch[name], more], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in batch:
            batch[name] = torch.cat([batch[name], torch.zeros_like(new)], 1)
    return batch, [answered(row, answer) for row, answer in zip(rows, answers, strict=True)]


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_answers_are_the_last_columns(family: Family, models: Any) -> None:
    """As GRPO, RLOO and online DPO read them."""
    model = models(family)
    batch, rows = online(family)
    for positions in numberings(family):
        ocvtp.apply(model, family.pruner(), keep=family.keep, positions=positions)
        full = model(**batch)
        kept = model(**batch, logits_to_keep=WIDE + 1)
        assert torch.equal(full.logits[:, -WIDE - 1 :], kept.logits)
        for i, (row, answer) in enumerate(zip(rows, ANSWERS, strict=False)):
            want = model(**row).logits[0, -len(answer) - 1 :]
            torch.testing.assert_close(kept.logits[i, : len(answer) + 1], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_a_row_alone_keeps_its_trailing_padding(family: Family, models: Any) -> None:
    model = models(family)
    row = answered(_rows(family)[1], ANSWERS[1], WIDE)
    want = answered(_rows(family)[1], ANSWERS[1])
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    got = model(**row).logits[0, -WIDE:][:2]
    torch.testing.assert_close(got, model(**want).logits[0, -2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_columns_lead_back(family: Family, models: Any, side: str) -> None:
    """Every column of a padded batch says what it says in its row alone, or that it was dropped."""
    model = models(family)
    batch, rows = online(family) if side == "left" else (family.batch(side="right"), _rows(family))
    long = batch["input_ids"].shape[1]
    ocvtp.apply(model, family.pruner(), keep=family.keep, columns=True)
    out = model(**batch, output_hidden_states=True)
    assert out.columns.shape == (len(rows), long)
    assert out.columns.dtype == torch.long
    kept = lengthen(out.logits, out.columns, torch.nan)
    states = lengthen(out.hidden_states[-1], out.columns, torch.nan)
    last = model(**batch, logits_to_keep=3)
    tail = lengthen(last.logits, last.columns, torch.nan)
    assert torch.equal(tail[~tail.isnan()], last.logits.flatten())
    dropped = 0
    for i, row in enumerate(rows):
        alone = model(**row, output_hidden_states=True)
        want = lengthen(alone.logits, alone.columns, torch.nan)[0]
        live = batch["attention_mask"][i].bool()
        torch.testing.assert_close(kept[i, live], want, atol=1e-4, rtol=1e-4, equal_nan=True)
        want = lengthen(alone.hidden_states[-1], alone.columns, torch.nan)[0]
        torch.testing.assert_close(states[i, live], want, atol=1e-4, rtol=1e-4, equal_nan=True)
        gone = alone.columns[0] < 0
        assert set(row["input_ids"][0, gone].tolist()) <= {120, 121}  # placeholders
        dropped += int(gone.sum())
    assert dropped == sum(int((x["input_ids"] >= 120).sum()) for x in rows) - _left(batch, out.columns)


def _left(batch: Inputs, columns: torch.Tensor) -> int:
    return int(((columns >= 0) & (batch["input_ids"] >= 120)).sum())


@torch.no_grad()
def test_columns_of_generate_and_later_turns(model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, columns=True)
    batch, rows = mixed()
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    states = lengthen(out.hidden_states[0][-1], out.columns, torch.nan)
    for i, row in enumerate(rows):
        alone = model(**row, output_hidden_states=True)
        want = lengthen(alone.hidden_states[-1], alone.columns, torch.nan)[0]
        live = batch["attention_mask"][i].bool()
        torch.testing.assert_close(states[i, live], want, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert isinstance(model.generate(**batch, **GREEDY), torch.Tensor)
    first = model(**rows[0], use_cache=True)
    more = model(input_ids=torch.tensor([[7, 8]]), past_key_values=first.past_key_values)
    assert more.columns.tolist() == [[0, 1]]


@torch.no_grad()
def test_columns_are_there_where_nothing_is_dropped(model: Any, oc_pruner: Any) -> None:
    rows = [prompt(ONE, pixels(1)), prompt(NONE)]
    before = model(**rows[0])
    for keep in (TOKENS, KEEP):
        ocvtp.apply(model, oc_pruner, keep=keep, columns=True)
        for row in rows[:1] if keep == TOKENS else rows[1:]:
            assert model(**row).columns.tolist() == [[*range(row["input_ids"].shape[1])]]
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert not hasattr(model(**rows[0]), "columns")
    ocvtp.remove(model)
    assert type(model(**rows[0])) is type(before)


@torch.no_grad()
def test_outputs_with_columns_are_outputs(model: Any, oc_pruner: Any) -> None:
    inputs = prompt(TWO, pixels(2))
    plain = type(model(**inputs))
    ocvtp.apply(model, oc_pruner, keep=KEEP, columns=True)
    out = model(**inputs)
    assert isinstance(out, plain)
    for twin in (
        copy.deepcopy(out),
        pickle.loads(pickle.dumps(out)),
        torch.utils._pytree.tree_map(lambda leaf: leaf, out),
        type(out)(dict(out)),
    ):
        assert type(twin) is type(out)
        assert torch.equal(twin.columns, out["columns"])
        assert torch.equal(twin.to_tuple()[0], out.logits)
    assert len(model(**inputs, return_dict=False)) == len(out) - 1
    with pytest.raises(ValueError, match="of one output"):
        lengthen(out.logits, out.columns[0])
