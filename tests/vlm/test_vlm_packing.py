"""Several documents packed into one row by positions that start over: each as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import ocvtp
from tests.vlm.family import Family, Inputs, families, numberings, packed
from tests.vlm.tiny_llava import GREEDY

CASES = [pytest.param(family, id=family.name) for family in families()]


@functools.cache
def _documents(family: Family) -> dict[str, Inputs]:
    made = {}
    for kind, row in family.rows().items():
        labels = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
        labels[:, 0] = -100  # nobody predicts it, as flattening collators say
        made[kind] = {**row, "labels": labels}
    return made


def _together(model: Any, rows: Sequence[Sequence[Inputs]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean loss over tokens, and the logits of each document alone."""
    total, count, logits = torch.zeros(()), 0, []
    for document in (document for row in rows for document in row):
        out = model(**document, use_cache=False)
        tokens = int((document["labels"][:, 1:] != -100).sum())
        total, count = total + out.loss * tokens, count + tokens
        logits.append(out.logits[0])
    return total / count, logits


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    made = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return made


def _assert_alike(got: torch.Tensor, rows: Sequence[Sequence[Inputs]], alone: list[torch.Tensor]) -> None:
    """``got`` ``[B, n, V]`` holds the rows' documents one behind the other, padded on the left or right."""
    left = iter(alone)
    for logits, row in zip(got, rows, strict=True):
        want = torch.cat([next(left) for _ in row])
        starts = range(len(logits) - len(want) + 1)
        assert min(float((logits[i : i + len(want)] - want).abs().max()) for i in starts) < 1e-4


@pytest.mark.parametrize("family", CASES)
def test_a_packed_row_is_its_documents_alone(family: Family, models: Any) -> None:
    model, documents = models(family), _documents(family)
    rows = [[documents["two"], documents["text"], *list(documents.values())[3:], documents["one"]]]
    for positions in numberings(family):
        ocvtp.apply(model, family.pruner(), keep=family.keep, positions=positions)
        loss, alone = _together(model, rows)
        want = _gradients(model, loss)
        inputs = packed(family, model, rows)
        out = model(**inputs, use_cache=False)
        torch.testing.assert_close(out.logits[0], torch.cat(alone), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
        got = _gradients(model, out.loss)
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
        with torch.no_grad():  # transformers itself finds no documents where it makes a cache
            torch.testing.assert_close(model(**inputs, use_cache=True).logits, out.logits)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_rows_of_different_lengths(family: Family, models: Any) -> None:
    """The shorter ends in columns that are documents of their own; pruned, another may be shorter."""
    model, documents = models(family), _documents(family)
    rows = [[documents["two"], documents["one"]], [documents["text"], documents["one"], documents["text"]]]
    for positions in numberings(family):
        ocvtp.apply(model, family.pruner(), keep=family.keep, positions=positions)
        _, alone = _together(model, rows)
        _assert_alike(model(**packed(family, model, rows), use_cache=False).logits, rows, alone)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_keeping_all_leaves_packing_to_transformers(family: Family, models: Any) -> None:
    model, documents = models(family), _documents(family)
    inputs = packed(family, model, [[documents["two"], documents["text"], documents["one"]]])
    want = model(**inputs, use_cache=False).logits
    ocvtp.apply(model, family.pruner(), keep=1.0)
    assert torch.equal(model(**inputs, use_cache=False).logits, want)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_eager_attention(family: Family) -> None:
    model, documents = family.model("eager"), _documents(family)
    rows = [[documents["two"], documents["text"], documents["one"]]]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    _, alone = _together(model, rows)
    _assert_alike(model(**packed(family, model, rows), use_cache=False).logits, rows, alone)


@pytest.mark.parametrize("family", CASES)
def test_what_documents_cannot_do_is_refused(family: Family, models: Any) -> None:
    model, documents = models(family), _documents(family)
    inputs = packed(family, model, [[documents["one"], documents["text"]]])
    inputs.pop("labels")
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    with pytest.raises(ValueError, match="several documents: generate"):
        model.generate(**inputs, **GREEDY)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="nothing can follow"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 4, 8]))
    if family.name == "paligemma":
        inputs.pop("token_type_ids")
        with pytest.raises(ValueError, match="need token_type_ids"):
            model(**inputs)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_with_a_mask_positions_are_no_documents(family: Family, models: Any) -> None:
    """As in transformers: left-padded rows start at 1, then at 0, which says nothing."""
    model, row = models(family), _documents(family)["one"]
    wide = {name: torch.nn.functional.pad(row[name], (2, 0)) for name in row if name.endswith("_ids")}
    mask = torch.nn.functional.pad(torch.ones_like(row["input_ids"]), (2, 0))
    numbers = packed(family, model, [[row]])["position_ids"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model(**{**row, "position_ids": numbers}, attention_mask=mask[:, 2:]).logits
    padded = torch.nn.functional.pad(numbers, (2, 0), value=1)
    given = {name: value for name, value in row.items() if name != "labels"}
    got = model(**{**given, **wide}, position_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(got[:, -want.shape[1] :], want, atol=1e-4, rtol=1e-4)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Attention that finds documents as flash attention does, on a CPU."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None
        width = query.shape[2]
        allowed = torch.ones(len(query), width, width, dtype=torch.bool).tril()
        if position_ids is not None and len(query) == 1:
            document = (position_ids == position_ids.min()).cumsum(1)
            allowed &= document[:, :, None] == document[:, None]
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, allowed[:, None], scale=kwargs.get("scaling")
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("flash_of_this_test", attend)
    AttentionMaskInterface.register("flash_of_this_test", flash_attention_mask)

    def switch(model: Any) -> None:
        config = model.config.get_text_config()
        monkeypatch.setattr(config, "_attn_implementation", "flash_of_this_test")

    return switch


@pytest.mark.parametrize("family", [case for case in CASES if case.id not in ("gemma3", "paligemma")])
@torch.no_grad()
def test_flash_attention_finds_them_by_position(family: Family, models: Any, flash: Any) -> None:
    model, documents = models(family), _documents(family)
    flash(model)
    rows = [[documents["two"], documents["text"], documents["one"]]]
    inputs = packed(family, model, rows)
    for positions in numberings(family):
        ocvtp.apply(model, family.pruner(), keep=family.keep, positions=positions)
        _, alone = _together(model, rows)
        got = model(**inputs).logits
        _assert_alike(got, rows, alone)
        ones = torch.ones_like(inputs["input_ids"])  # which flash attention forgets
        assert torch.equal(model(**inputs, attention_mask=ones).logits, got)
    with pytest.raises(ValueError, match="only in a single row"):
        model(**packed(family, model, [*rows, *rows]))
    if not family.mrope:
        inputs["position_ids"][..., -len(documents["one"]["input_ids"][0]) :] += 1
        with pytest.raises(ValueError, match="start over at the same number"):
            model(**inputs)


def test_attention_that_takes_no_such_mask_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(family for family in families() if family.name == "llava")
    documents = _documents(family)
    inputs = packed(family, model, [[documents["one"], documents["text"]]])
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    AttentionMaskInterface.register("strange_of_this_test", lambda **_: None)
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation", "strange_of_this_test")
    with pytest.raises(ValueError, match="strange_of_this_test attention takes no mask"):
        model(**inputs)
