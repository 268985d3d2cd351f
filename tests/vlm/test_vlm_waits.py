"""How often the vision side makes the host wait for the device, from pixels to kept rows: never, or why."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ocvtp
from bench.guard.remote import Remote, move, remote_device
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.encode.encode import groups_of, prune_rows
from ocvtp_kernels._device import on_device
from tests.vlm.family import Family, families, made
from tests.vlm.skips import needs_mm_route

#: Much like another one of the suite.
ALIKE = {"smolvlm", "paligemma", "internvl", "qwen2_vl", "qwen3_vl_moe"}
CASES = [
    pytest.param(family, id=family.name, marks=[pytest.mark.thorough] if family.name in ALIKE else [])
    for family in families()
]
#: Families that tell images of several sizes apart, as those of these tests are.
OF_SEVERAL_SIZES = {"llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
#: What has to be known before tokens can be counted: which tiles are not zeros that fill up a batch.
REAL_TILES = {"idefics3": {"tolist": 1}, "smolvlm": {"tolist": 1}}


@pytest.fixture(autouse=True)
def newest() -> None:
    needs_mm_route()  # towers of older transformers wait in other places


def remote(family: Family, pruner: Any = None, **options: Any) -> Any:
    """A patched model of the family on a device that isn't there, one of its own."""
    model = move(copy.deepcopy(made(family)))
    pruner = move(family.pruner()) if pruner is None else pruner
    ocvtp.apply(model, pruner, **{"keep": family.keep, "backend": "torch", **options})
    return model


def pixels(family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
    """All images of the family's rows together, of several sizes where there are, and all videos.

    Pixels are on the device; what says how big they are is on the host, where processors make it.
    """
    for modality, names in family.pixels.items():
        rows = [row for row in family.rows().values() if names[0] in row]
        given = {}
        for name in names:
            parts = [row[name] for row in rows if name in row]
            if parts and parts[0].ndim == 5:  # tiles: padded to the most
                most = max(part.shape[1] for part in parts)
                parts = [torch.nn.functional.pad(x, (0, 0) * 3 + (0, most - x.shape[1])) for x in parts]
            if parts:
                given[name] = torch.cat(parts)
        if given:
            yield modality, {**given, names[0]: Remote(given[names[0]])}


def encoded(model: Any, modality: str, given: dict[str, Any]) -> tuple[Vision, Counter[str], Counter[str]]:
    """The vision side after it ran, and what made it wait: when it was made, and when it ran again."""
    controller = controller_of(model)
    for _ in range(2):  # something is made once
        with remote_device() as making:
            vision = controller.adapter.vision(modality, given, controller.settings)
        with remote_device() as running:
            prune_rows(vision, controller.settings)
    return vision, making, running


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_the_vision_side_never_waits(family: Family) -> None:
    """Nor for a part of the images, be they one after another or not."""
    model = remote(family)
    for modality, given in pixels(family):
        vision, making, running = encoded(model, modality, given)
        assert dict(making) == REAL_TILES.get(family.name, {})
        assert dict(running) == {}
        sizes = {one.tokens for one in vision.segments}
        assert (len(sizes) > 1) == (modality == "image" and family.name in OF_SEVERAL_SIZES)
        for group in groups_of(vision.segments, controller_of(model).settings.budget):
            assert isinstance(group.keep, int)
            for which in {group.which[::2], group.which[1:], group.which[:1]} - {()}:
                indices = Remote(torch.arange(group.keep).expand(len(which), -1).contiguous())
                with remote_device() as waits:
                    vision.features(which)
                    vision.scores(which, "torch")
                    vision.source(which)
                    vision.rows(which, indices, None)
                    vision.projected(which)
                assert dict(waits) == {}


#: Options -> what waits, and why it has to.
KNOWN: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "random": ({"pruner": "random"}, {}),
    "grid": ({"pruner": "grid"}, {}),
    "attention": ({"pruner": "attention"}, {}),
    "farthest_point": ({"pruner": "farthest_point"}, {}),
    "greedy_dpp": ({"pruner": "greedy_dpp"}, {}),
    "refined": ({"refine": 1}, {}),
    "kept_rows": ({"tower": "kept_rows"}, {}),
    "thrown away": ({"merge": "off", "weigh": False}, {}),
    "before the projector": ({"merge": "features"}, {}),
    "visionzip": ({"pruner": "visionzip"}, {}),
    "tome": ({"pruner": "tome"}, {}),
    "prumerge+": ({"pruner": "prumerge+"}, {}),
    "all newlines": ({"newlines": "all"}, {}),
    # How many newlines stay decides how long the prompt is; images of one size are asked about together.
    "newlines of rows": ({"newlines": "rows"}, {"tolist": 2}),
    # So does what each image keeps; of two sizes, likewise.
    "auto": ({"keep": "auto", "max_error": 0.5, "budgets": (3, 6)}, {"tolist": 2}),
}


ALIKE_TOO = KNOWN.keys() - {"random", "grid", "greedy_dpp", "visionzip", "newlines of rows", "auto"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if name in ALIKE_TOO else []) for name in KNOWN]
)
@torch.no_grad()
def test_what_waits_and_why(name: str) -> None:
    """Images of two sizes that are cut into tiles."""
    family = next(one for one in families() if one.name == "llava_next")
    options, known = KNOWN[name]
    model = remote(family, **{"keep": 10, **options})
    for modality, given in pixels(family):
        vision, making, running = encoded(model, modality, given)
        assert len({one.tokens for one in vision.segments}) == 2
        assert dict(making) == {}
        assert dict(running) == known


def test_some_of_a_batch_are_those_that_an_index_would_take() -> None:
    x = torch.arange(12.0).view(4, 3)
    for which in ((0, 1, 2, 3), (1, 2), (3,), (0, 2), (2, 0), (3, 3), ()):
        assert torch.equal(some_of(x, which), x[list(which)])
    assert some_of(x, range(4)) is x
    assert some_of(x, (1, 2)).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    leaf = x.clone().requires_grad_()
    (some_of(leaf, (0, 2, 2)) * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].tolist() == [1, 0, 5, 0]


def test_copies_to_a_gpu_are_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Host(torch.Tensor):
        def is_pinned(self, device: Any = None) -> bool:
            return "pinned" in said

        def pin_memory(self, device: Any = None) -> Any:
            said.append("pinned")
            return self

        def to(self, *args: Any, **kwargs: Any) -> Any:
            said.append((*args, kwargs))
            return self

    numbers, gpu, cpu = torch.arange(3).as_subclass(Host), torch.device("cuda", 0), torch.device("cpu")
    on_device(numbers, gpu)
    assert said == ["pinned", (gpu, {"non_blocking": True})]
    on_device(numbers, gpu)  # is pinned now
    assert said[2:] == [(gpu, {"non_blocking": True})]
    said.clear()
    on_device(numbers, cpu)
    assert said == [(cpu, {"non_blocking": True})]
