"""Fixtures for the patch's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration

import ocvtp
from ocvtp import OCPruner
from tests.threads import single_threaded
from tests.vlm.family import Family, made
from tests.vlm.skips import needs_mm_route, needs_original
from tests.vlm.tiny_llava import KEEP, WEIGHED, llava, pruner


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture(params=["mm_encoder_outputs", "inputs_embeds"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both hand-over routes; the older one also on a transformers that has the newer."""
    if request.param == "mm_encoder_outputs":
        needs_mm_route()
    monkeypatch.setattr("ocvtp.vlm.resolving.route_of", lambda model: request.param)
    return request.param


@pytest.fixture(params=["compact", "original"])
def positions(request: pytest.FixtureRequest) -> str:
    if request.param == "original":
        needs_original()
    return request.param


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return llava()


@pytest.fixture
def models() -> Iterator[Any]:
    """The family's model, unpatched before and after."""
    used = []

    def get(family: Family) -> Any:
        used.append(made(family))
        return used[-1]

    yield get
    for model in used:
        ocvtp.remove(model)
        assert "forward" not in model.__dict__


@pytest.fixture
def oc_pruner() -> OCPruner:
    return pruner()


@pytest.fixture(params=["sdpa", "eager"])
def weighed(request: pytest.FixtureRequest, oc_pruner: OCPruner) -> LlavaForConditionalGeneration:
    """Patched, with kept tokens that stand for the others, on each attention."""
    model = llava(request.param)
    ocvtp.apply(model, oc_pruner, keep=KEEP, **WEIGHED)
    return model
