"""``fullgraph`` and ``torch.export`` on calls with pixels, in the families that upstream can trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.rivals.catalog import METHODS
from tests.vlm.family import Family, families, joined
from tests.vlm.skips import NATIVE_ROUTE
from tests.vlm.tiny_llava import ONE, llava, pixels, prompt

#: The others compute with grids or image sizes from tensors, which can't be traced unpatched either.
TRACED = ("llava", "internvl", "idefics3", "smolvlm", "gemma3", "paligemma")
CASES = [
    pytest.param(family, id=family.name, marks=() if family.name == "llava" else pytest.mark.slow)
    for family in families()
    if family.name in TRACED
]
pytestmark = pytest.mark.skipif(NATIVE_ROUTE != "mm_encoder_outputs", reason="upstream can't be traced")


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_export(family: Family) -> None:
    model, row = family.model(), family.rows()["two"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model(**row).logits
    program = torch.export.export(Logits(model), (), kwargs=row, strict=False).module()
    torch.testing.assert_close(program(**row), want, atol=1e-5, rtol=1e-5)
    other = {**row, "pixel_values": row["pixel_values"].flip(-1)}
    torch.testing.assert_close(program(**other), model(**other).logits, atol=1e-5, rtol=1e-5)
    swapped = {**row, "input_ids": row["input_ids"].clone()}
    swapped["input_ids"][0, -1] = model.config.image_token_id
    with pytest.raises(RuntimeError, match=r"whole images|do not match|placeholders"):
        program(**swapped)


@pytest.mark.parametrize("choice", ["pruner", pytest.param("farthest_point", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_one_graph(family: Family, choice: str) -> None:
    model, row = family.model(), family.rows()["one"]
    ocvtp.apply(model, family.pruner() if choice == "pruner" else choice, keep=family.keep)  # type: ignore[arg-type]
    compiled = torch.compile(Logits(model), fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(**row), model(**row).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["visionzip", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "visionzip")]
)
@torch.no_grad()
def test_methods_of_others_in_one_graph(name: str) -> None:
    model, row = llava(), prompt(ONE, pixels(1))
    reads = METHODS[name].reads_text
    ocvtp.apply(model, METHODS[name]("language_model") if reads else name, keep=6)  # type: ignore[call-arg, arg-type]
    compiled = torch.compile(Logits(model), fullgraph=True, backend="eager", dynamic=False)
    if reads:
        with pytest.raises(Exception, match="can't be compiled"):
            compiled(**row)
    else:
        torch.testing.assert_close(compiled(**row), model(**row).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_that_lose_as_many_columns(models: Any) -> None:
    """Padding stays where it is: a graph can't know how much there is."""
    family = next(family for family in families() if family.name == "llava")
    model, row = family.model(), family.rows()["one"]
    longer = {**row, "input_ids": torch.cat([row["input_ids"], torch.tensor([[31, 32]])], 1)}
    batch = joined([row, longer])
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    compiled = torch.compile(Logits(model), fullgraph=True, backend="eager", dynamic=False)
    got = compiled(**batch)
    for i, one in enumerate((row, longer)):
        want = model(**one).logits[0]
        torch.testing.assert_close(got[i, -len(want) :], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_columns_and_a_cache_in_one_graph() -> None:
    family = next(family for family in families() if family.name == "llava")
    model, row = family.model(), family.rows()["one"]
    ocvtp.apply(model, family.pruner(), keep=family.keep, columns=True)

    def call(**inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(**inputs, use_cache=True)
        return out.logits, out.columns

    got = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)(**row)
    want = call(**row)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[1], want[1])


@torch.no_grad()
def test_positions_that_the_caller_passes() -> None:
    """They may say that a row holds several documents, which a graph can't look for."""
    family = next(family for family in families() if family.name == "llava")
    model, row = family.model(), family.rows()["one"]
    positions = torch.arange(row["input_ids"].shape[1])[None]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    row = {name: value for name, value in row.items() if name != "attention_mask"}
    compiled = torch.compile(Logits(model), fullgraph=True, backend="eager", dynamic=False)
    got = compiled(**row, position_ids=positions)
    want = model(**row, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="one document per row"):
        compiled(**row, position_ids=positions % 5)
