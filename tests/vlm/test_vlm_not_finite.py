"""A picture with NaN in it, in a batch of good ones."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.methods import grid
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.rivals import VisPruner
from tests.far import FarLine
from tests.vlm.tiny_llava import GREEDY, KEEP, ONE, TOKENS, llava, pad, pixels, pruner

EVEN = grid(torch.empty(1, TOKENS, 1), KEEP).indices[0]
#: Everybody who reads features or scores, with what else may follow.
CHOOSERS: dict[str, dict[str, Any]] = {
    "attention": {"pruner": "attention"},
    "farthest_point": {"pruner": "farthest_point"},
    "greedy_dpp": {"pruner": "greedy_dpp", "refine": 1},
    "pruner": {"pruner": pruner()},
    "pruner of what is consumed": {"pruner": pruner(layer=4), "refine": 1},
}


def pictures(bad: bool) -> torch.Tensor:
    images = pixels(3)
    if bad:
        images[1, 2, 7, 7] = torch.nan
    return images


def inputs(bad: bool) -> dict[str, Any]:
    return {**pad([ONE] * 3), "pixel_values": pictures(bad), **GREEDY}


@pytest.mark.parametrize("name", CHOOSERS)
def test_the_others_are_answered_as_ever(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = llava()
    ocvtp.apply(model, **CHOOSERS[name], keep=KEEP, on_invalid="grid")
    want = ocvtp.vlm.select(model, pictures(bad=False))
    answers = model.generate(**inputs(bad=False))
    assert (want.from_slots >= 0).all()
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        got = ocvtp.vlm.select(model, pictures(bad=True))
        heard = model.generate(**inputs(bad=True))
    assert torch.equal(got.indices[1], EVEN)
    assert (got.from_slots < 0).tolist() == [False, True, False]
    assert torch.equal(got.indices[[0, 2]], want.indices[[0, 2]])
    assert torch.equal(heard[[0, 2]], answers[[0, 2]])
    assert len([one for one in caplog.records if "tokens spread evenly are kept" in one.message]) == 1


@pytest.mark.parametrize("name", CHOOSERS)
def test_it_is_refused_in_its_own_call(name: str, far: FarLine) -> None:
    """On a GPU too, since the host has waited for the rows' lengths before the language model begins."""
    far.arrived = 10**9
    model = llava()
    ocvtp.apply(model, **CHOOSERS[name], keep=KEEP)
    answers = model.generate(**inputs(bad=False))
    read: list[Any] = []
    model.model.language_model.register_forward_pre_hook(lambda *_: read.append(1))
    with pytest.raises(ValueError, match=r"in this call, (image \[1\] of 3|an image): .*NaN or Inf"):
        model.generate(**inputs(bad=True))
    assert not read
    assert torch.equal(model.generate(**inputs(bad=False)), answers)


def test_it_is_refused_in_the_next_one(far: FarLine) -> None:
    """Where the host did not know in time."""
    model = llava()
    ocvtp.apply(model, pruner(), keep=KEEP)
    answers = model.generate(**inputs(bad=False))
    model.generate(**inputs(bad=True))
    far.arrive()
    with pytest.raises(ValueError, match=r"in an earlier call, image \[1\] of 3"):
        model.generate(**inputs(bad=False))
    assert torch.equal(model.generate(**inputs(bad=False)), answers)
    assert far.waits == 0


def test_models_know_nothing_of_each_other(far: FarLine) -> None:
    """Not even if they share a pruner; nor do copies."""
    shared, model, other = pruner(), llava(), llava()
    for each in (model, other):
        ocvtp.apply(each, shared, keep=KEEP)
    ocvtp.vlm.select(model, pictures(bad=True))
    twin = copy.deepcopy(model)
    far.arrive()
    ocvtp.vlm.select(other, pictures(bad=False))
    ocvtp.vlm.select(twin, pictures(bad=False))
    shared.check()
    with pytest.raises(ValueError, match=r"image \[1\] of 3"):
        ocvtp.vlm.select(model, pictures(bad=False))


def test_methods_of_others_refuse_it(far: FarLine) -> None:
    model = llava()
    with pytest.raises(ValueError, match="on_invalid is for pruners and rules of our own"):
        ocvtp.apply(model, "vispruner", keep=KEEP, on_invalid="grid")
    ocvtp.apply(model, VisPruner(), keep=KEEP)
    ocvtp.vlm.select(model, pictures(bad=True))
    far.arrive()
    with pytest.raises(ValueError, match=r"in an earlier call, image \[1\] of 3: .*NaN or Inf"):
        ocvtp.vlm.select(model, pictures(bad=False))


def test_what_it_may_be() -> None:
    model = llava()
    with pytest.raises(ValueError, match=r'on_invalid must be "raise" or "grid"'):
        ocvtp.apply(model, on_invalid="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_invalid: for a pruner before the language model"):
        ocvtp.apply(model, None, inside=ocvtp.methods.in_llm.FastV(layer=1, keep=5), on_invalid="grid")
    ocvtp.apply(model, "random", keep=KEEP, on_invalid="grid")  # reads nothing
    assert controller_of(model).settings.selector.on_invalid == "grid"  # type: ignore[union-attr]
