"""What ``--model_args`` says, and what is refused before any model is there."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import ocvtp
from ocvtp.harness.arguments import PASSED, Arguments, inside_of, rival_of
from ocvtp.methods.in_llm import FastV, SparseVLM
from ocvtp.vlm.rivals import HiPrune


def given(**values: Any) -> Arguments:
    return Arguments.from_strings({"pretrained": "m", **values})


def test_every_option_of_apply_is_one() -> None:
    options = set(inspect.signature(ocvtp.apply).parameters)
    own = {each.name for each in dataclasses.fields(Arguments)}
    assert options - {"model", "columns"} == set(PASSED) | {"pruner", "keep", "inside"}
    assert not set(PASSED) & own
    with pytest.raises(TypeError, match="columns"):
        given(columns=True)


def test_values_are_read() -> None:
    found = given(
        pruner="hiprune",
        keep=0.25,
        settings='{"alpha": 0.2}',
        inside='{"name":"sparsevlm","keep":[9,6,3],"layers":[1,2,3]}',
        merge="off",
        weigh=False,
        revision="'12345'",
        system_prompt="'a, b'",
        image_grid_pinpoints="[[672,672]]",
        max_batch_size=64,
        batch_size="8",
        device=None,
    )
    assert found.settings == {"alpha": 0.2}
    assert inside_of(found.inside) == SparseVLM((1, 2, 3), (9, 6, 3))
    assert found.options == {"merge": "off", "weigh": False}
    assert found.revision == "12345"
    assert found.system_prompt == "a, b"
    assert found.image_grid_pinpoints == [[672, 672]]
    assert (found.batch_size, found.device, found.unpruned) == (8, None, False)
    assert given(pruner="none").unpruned
    assert not given(pruner="none", inside="fastv").unpruned


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"keeep": 3}, "unknown in --model_args: keeep"),
        ({"pretrained": " "}, "pretrained is empty"),
        ({"pruner": ""}, "pruner is empty"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"batch_size": 0}, "batch_size must be a number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a number"),
        ({"pad_to_square": "yes"}, "pad_to_square must be true or false"),
        ({"pruner": "grid", "layer": 8}, "layer is for official weights"),
        ({"pruner": "none", "keep": 3}, "leave keep out"),
        ({"pruner": "none", "merge": "off"}, "merge: for a pruner"),
        ({"pruner": "grid", "settings": "{}"}, "settings is for rival methods"),
        ({"pruner": "grid", "text_encoder": "clip"}, "text_encoder is for trim and cdpruner"),
        ({"settings": "[1]", "pruner": "hiprune"}, "settings must be a JSON object"),
        ({"settings": "{", "pruner": "hiprune"}, "settings can't be read as JSON"),
        ({"inside": "slowv"}, 'inside needs a "name"'),
        ({"inside": '{"name":"fastv","depth":3}'}, "inside fastv has no setting depth; it has keep, layer"),
        ({"image_grid_pinpoints": "672"}, "image_grid_pinpoints must be a list"),
        ({"revision": 1.5}, "revision must be text; got 1.5: put it in quotes"),
        ({"revision": 12345}, "revision must be text; got 12345: put it in quotes"),
        ({"pretrained": 7}, "pretrained must be text"),
        ({"dtype": "float17"}, "dtype must be"),
        ({"dtype": "nn"}, "dtype must be"),
        ({"layer": 21.5}, "layer must be the number of an encoder layer"),
        ({"image_grid_pinpoints": "[[672]]"}, "image_grid_pinpoints must be pairs"),
        ({"image_grid_pinpoints": "[672,672]"}, "image_grid_pinpoints must be pairs"),
        ({"merge": "of"}, "merge must be one of"),
        ({"seed": 0.5}, "seed"),
        ({"on_invalid": "ignore"}, "on_invalid"),
        ({"pruner": "grid", "keep": "auto"}, 'keep="auto" compares coverage'),
        ({"pruner": "none", "inside": "fastv", "seed": 3}, "seed: for a pruner"),
    ],
)
def test_what_can_not_be_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        given(**values)
    assert named in str(caught.value)


def test_a_model_is_needed() -> None:
    with pytest.raises(TypeError, match="needs pretrained="):
        Arguments.from_strings({"pruner": "grid"})


def test_methods_are_made_with_their_settings() -> None:
    assert rival_of("hiprune", {"alpha": 0.2}, None).alpha == 0.2
    assert type(rival_of("hiprune", {}, None)) is HiPrune
    assert inside_of({"name": "fastv", "layer": 3, "keep": 7}) == FastV(3, 7)
    assert inside_of({"name": "sparsevlm2"}).version == 2
    with pytest.raises(ValueError, match="hiprune has no setting behind; it has alpha, object_layer"):
        rival_of("hiprune", {"behind": True}, None)
