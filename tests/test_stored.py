"""Dataclasses as schemas, strict JSON and seals, by themselves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch

from ocvtp.stored.fields import Within, check_fields, from_object
from ocvtp.stored.refused import Refused, refused_as
from ocvtp.stored.seal import sealed, tensor_digest, unsealed
from ocvtp.stored.strict_json import parse_object
from ocvtp.stored.tensors import check_tensors, read_facts, save_sealed


@dataclass(frozen=True)
class Part:
    name: str
    count: Annotated[int | None, Within(1, 9)] = None


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    kind: Literal["a", "b"] = "a"
    share: Annotated[float, Within(0, 1, above=True, below=True)] = 0.5
    flags: dict[str, bool] = field(default_factory=dict)
    sizes: Annotated[list[int], Within(1, 2)] = field(default_factory=lambda: [1])
    free: Any = None


def test_what_fits_is_made() -> None:
    values = {"parts": [{"name": "x", "count": 3}, {"name": "y"}], "share": 0.25, "flags": {"on": True}}
    made = from_object(Whole, json.loads(json.dumps(values)))
    assert made == Whole((Part("x", 3), Part("y")), share=0.25, flags={"on": True})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": None}, "parts must be a list; got None"),
        ({"parts": "ab"}, "parts must be a list"),
        ({"parts": [{"name": 3}]}, r"parts\[0\]\.name must be text; got 3"),
        ({"parts": [{"name": "x"}, {"count": 1}]}, r"parts\[1\] lacks name"),
        (
            {"parts": [{"name": "x", "count": 10}]},
            r"parts\[0\]\.count must be an int of at least 1 and at most 9",
        ),
        (
            {"parts": [{"name": "x", "colour": 1}]},
            r"parts\[0\]: unknown field\(s\) 'colour'; there are: name",
        ),
        ({"kind": "c"}, 'kind must be one of "a", "b"; got \'c\''),
        ({"kind": ["a"]}, "kind must be one of"),
        ({"share": 1}, "share must be a number above 0 and below 1; got 1"),
        ({"share": math.nan}, "share must be a number"),
        ({"share": 10**400}, "got an int of 1329 bits"),
        ({"share": True}, "share must be a number"),
        ({"flags": {"on": 1}}, r"flags\.on must be true or false; got 1"),
        ({"flags": {1: True}}, "flags must be an object"),
        ({"sizes": []}, "sizes must be a list with a length of at least 1"),
        ({"sizes": [1.0]}, r"sizes\[0\] must be an int; got 1\.0"),
    ],
)
def test_what_does_not_is_named(change: dict, said: str) -> None:
    with pytest.raises(Refused, match=said):
        from_object(Whole, {"parts": [], **change})


def test_in_a_constructor() -> None:
    @dataclass(frozen=True)
    class Made:
        sizes: tuple[int, ...]

        def __post_init__(self) -> None:
            check_fields(self)

    assert Made([1, 2]).sizes == (1, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Made\.sizes\[0\] must be an int; got 'x'"):
        Made(("x",))  # type: ignore[arg-type]


def test_the_spelling_of_what_is_sealed_does_not_matter() -> None:
    values = {"one": {"b": 1e-5, "a": [1, 2]}, "other": "\ud800 \u00e9"}
    text = json.dumps(sealed(values))
    shuffled = f'{{"other": {json.dumps(values["other"])}, "one": {{"a":[1,2],"b":0.00001}}, '
    assert unsealed(parse_object(shuffled + text[text.index('"seal"') :])) == values
    with pytest.raises(Refused, match="one is not what was written"):
        unsealed({**sealed(values), "one": {"b": 1e-5, "a": [2, 1]}})
    with pytest.raises(
        Refused, match="one, other are not what was written"
    ):  # equal values don't change places
        unsealed({**sealed({"one": 1, "other": 2}), "one": 2, "other": 1})
    with pytest.raises(ValueError, match="JSON"):
        sealed({"loss": math.nan})


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 1}', "[]", "", '{"b": {"a": 1, "a": 2}}']
)
def test_what_json_has_not(text: str) -> None:
    with pytest.raises(OSError, match=r"file: .*; mend it"), refused_as(OSError, Path("file"), "mend it"):
        parse_object(text)


def test_tensors_of_any_kind_are_digested(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(6.0).reshape(2, 3),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
    }
    assert tensor_digest(tensors["matrix"].t().contiguous().t()) == tensor_digest(tensors["matrix"])
    assert len({tensor_digest(torch.zeros(2, dtype=d)) for d in (torch.float32, torch.int32)}) == 2
    assert tensor_digest(torch.zeros(2, 3)) != tensor_digest(torch.zeros(3, 2))
    save_sealed(tmp_path / "file", tensors, {"step": 3})
    found = read_facts(tmp_path / "file")
    assert found is not None
    facts, digests = found
    assert facts == {"step": 3}
    check_tensors(tensors, digests)
    with pytest.raises(Refused, match="scalar is not what was written"):
        check_tensors({**tensors, "scalar": torch.tensor(4)}, digests)
    with pytest.raises(Refused, match="it lacks half"):
        check_tensors({k: v for k, v in tensors.items() if k != "half"}, digests)
