"""The pruner beside the tower, captured: from apply to remove, on a rehearsed lane."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import ocvtp
from ocvtp.pruner.assignment import Assignment
from ocvtp.pruner.capture import SlotRunner
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.encode.encode import encode
from ocvtp.vlm.towers.ahead import ahead
from ocvtp.vlm.towers.clip import root
from tests.rehearsal import Rehearsal
from tests.vlm.family import by_name, made
from tests.vlm.tiny_llava import GREEDY, KEEP, LAYERS, ONE, llava, pixels, prompt, pruner

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="rehearsed in Triton's interpreter; test_vlm_gpu.py has the real thing"
)

OPTIONS: dict[str, Any] = {"keep": KEEP, "backend": "triton", "precision": "fp32"}


def runner_of(model: Any) -> SlotRunner:
    return controller_of(model).settings.selector.runner


@pytest.mark.parametrize(("layer", "strategy"), [(-2, "default"), (-2, "full"), ([-3, -2], "default")])
def test_the_same_tokens_as_without(lanes: list[Rehearsal], layer: Any, strategy: str) -> None:
    model = llava(layer=layer, strategy=strategy)
    run = ONE.index(ONE[3])
    ids = [*ONE[:run], *[ONE[run]] * (17 if strategy == "full" else 16), *ONE[run + 16 :]]
    inputs = [{**prompt(ids, pixels(1, seed)), **GREEDY} for seed in range(4)]
    ocvtp.apply(model, pruner(), keep=KEEP, backend="torch")
    want = [model.generate(**one) for one in inputs]
    assert not lanes
    ocvtp.apply(model, pruner(), **OPTIONS)
    got = [model.generate(**one) for one in inputs]
    assert all(map(torch.equal, got, want))
    assert runner_of(model).graphs == 1
    assert lanes[0].log.count("replay") == 2


def test_refined_after_the_replay(lanes: list[Rehearsal]) -> None:
    model, images = llava(), [pixels(1, seed) for seed in range(4)]
    ocvtp.apply(model, pruner(), keep=KEEP, backend="torch", refine=1)
    want = [ocvtp.vlm.select(model, image).indices for image in images]
    ocvtp.apply(model, pruner(), **OPTIONS, refine=1)
    assert all(map(torch.equal, (ocvtp.vlm.select(model, image).indices for image in images), want))
    assert lanes[0].log.count("replay") == 2


def test_the_slot_loop_starts_before_the_layers_that_follow(lanes: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(layer=2), **OPTIONS)
    seen: list[str] = []
    for index, layer in enumerate(root(model.model.vision_tower).encoder.layers):
        layer.register_forward_hook(
            lambda *_, index=index: seen.append(f"layer {index} after {lanes[0].log[-1] if lanes else None}")
        )
    ocvtp.vlm.select(model, pixels(1))
    before = [f"layer {index} after None" for index in range(3)]
    beside = [f"layer {index} after mark" for index in range(3, LAYERS - 1)]
    assert seen == before + beside
    assert lanes[0].log == ["run", "mark"] * 2 + ["join"] * 2  # slots, then scores beside the last layer


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "qwen2_5_vl",
        *(
            pytest.param(name, marks=THOROUGH)
            for name in ("gemma3", "internvl", "llava_next", "llava_onevision")
        ),
    ],
)
def test_scores_start_before_the_layer_they_are_of(
    lanes: list[Rehearsal], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its input, and they are the ones that follow from it afterwards, to the bit."""
    family = by_name(name)
    model, inputs = copy.deepcopy(made(family)), family.rows()["two"]
    names = [one for one in family.pixels["image"] if one in inputs]
    given = {one: inputs[one] for one in names}
    ocvtp.apply(model, family.pruner(), **{**OPTIONS, "keep": family.keep})
    controller = controller_of(model)
    order: list[str] = []
    layers = getattr(controller.adapter.tower, "blocks", None)  # Qwen's
    if layers is None:
        body = root(controller.adapter.tower)
        layers = getattr(body.encoder, "layers", None) or body.encoder.layer
    (deepest,) = controller.adapter.facts({}).consumed_layers
    layers[deepest].register_forward_pre_hook(lambda *_: order.append(f"deepest after {lanes[0].log}"))

    def encoded() -> torch.Tensor:
        with torch.no_grad():
            return encode(controller.adapter, given, controller.settings, None)["image"].flat()

    found: list[torch.Tensor] = []
    select = Assignment.select

    def noted(self: Assignment, fill_scores: torch.Tensor | None = None) -> Any:
        assert fill_scores is not None
        found.append(fill_scores)
        return select(self, fill_scores)

    monkeypatch.setattr(Assignment, "select", noted)
    rows, groups = encoded(), len(found)
    assert order == [f"deepest after {['run', 'mark'] * (groups + 1)}"]
    assert lanes[0].log == ["run", "mark"] * (groups + 1) + ["join"] * (groups + 1)
    monkeypatch.setattr("ocvtp.vlm.encode.selectors.PrunerSelector.beside", lambda *_: None)
    assert torch.equal(encoded(), rows)
    assert len(found) == 2 * groups
    assert all(map(torch.equal, found[:groups], found[groups:]))


@pytest.mark.parametrize(
    "why",
    [
        "held",
        "torch",
        "autocast",
        "minded",
        *(pytest.param(why, marks=THOROUGH) for why in ("training", "another's module")),
    ],
)
def test_scores_that_follow_the_tower(lanes: list[Rehearsal], why: str) -> None:
    model = llava()
    backend = "torch" if why == "torch" else "triton"
    tower = "kept_rows" if why == "held" else "exact"
    ocvtp.apply(model, pruner(), keep=KEEP, backend=backend, tower=tower)
    layer = root(model.model.vision_tower).encoder.layers[LAYERS - 2]
    if why == "training":
        layer.train()
    elif why == "another's module":
        layer.mlp.extra = type("Foreign", (torch.nn.Linear,), {"__module__": "quantised"})(2, 2)
    elif why == "minded":
        layer._hf_hook = object()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        if why != "autocast":  # the interpreter has no bfloat16 products
            ocvtp.vlm.select(model, pixels(1))
        else:
            assert ahead(lambda *_: pytest.fail("started"), layer, [pixels(1)], torch.empty, "triton") is None
    assert [lane.log for lane in lanes] == ([] if why in ("torch", "autocast") else [["run", "mark", "join"]])


def test_selections_and_changing_batches(lanes: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    kept = [ocvtp.vlm.select(model, pixels(4)[:images]).indices for images in (1, 3) * 3]
    for indices in kept:
        assert torch.equal(indices, kept[1][: indices.shape[0]])  # each image's own, whatever the batch
    assert runner_of(model).graphs == 2
    attention = ocvtp.vlm.select(model, pixels(1), return_attention=True).slot_attention
    assert attention is not None
    assert attention.shape == (1, KEEP, 16)


def test_remove_and_apply_release_graphs(lanes: list[Rehearsal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocvtp.pruner.admission.SIGHTINGS", 1)
    model = llava()

    def graphs_after_a_call() -> SlotRunner:
        ocvtp.vlm.select(model, pixels(1))
        assert runner_of(model).graphs == 1
        return runner_of(model)

    ocvtp.apply(model, pruner(), **OPTIONS)
    first = graphs_after_a_call()
    ocvtp.apply(model, pruner(), **OPTIONS)
    assert first.graphs == 0
    second = graphs_after_a_call()
    with ocvtp.pruned(model, pruner(), **OPTIONS):
        inner = graphs_after_a_call()
        assert second.graphs == 1
    assert inner.graphs == 0
    assert runner_of(model) is second
    assert second.graphs == 1
    other = copy.deepcopy(model)
    assert runner_of(other).graphs == 0
    ocvtp.remove(model)
    assert second.graphs == 0
    ocvtp.vlm.select(other, pixels(1))


def test_capture_can_be_declined(lanes: list[Rehearsal]) -> None:
    model = llava()
    report = ocvtp.apply(model, pruner(), capture=False, **OPTIONS)
    assert not report.captured
    for _ in range(3):
        ocvtp.vlm.select(model, pixels(1))
    assert runner_of(model).graphs == 0
    assert lanes[0].log.count("run") == 2 * 3  # beside the tower all the same, and so are scores


def test_timing_runs_one_after_the_other(lanes: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    order: list[str] = []
    layers = root(model.model.vision_tower).encoder.layers
    layers[LAYERS - 2].register_forward_hook(lambda *_: order.append(f"lanes: {len(lanes)}"))
    with ocvtp.vlm.stage_times(model) as times:
        model.generate(**prompt(ONE, pixels(1)), **GREEDY)
    assert order == ["lanes: 0"]
    assert len(lanes) == 1
    assert times["pruner"] > 0


def test_the_report_says_what_computes() -> None:
    model = llava()
    report = ocvtp.apply(model, pruner(), **OPTIONS)
    assert (report.backend, report.precision) == ("triton", "fp32")
    assert "triton, fp32" in str(report)
    half = ocvtp.apply(model, pruner(), keep=KEEP, backend="triton", precision="fp16")
    assert half.precision == "fp16"
    assert ocvtp.apply(model, pruner().double(), keep=KEEP).precision == "fp64"
    with pytest.raises(ValueError, match="needs the Triton kernels"):
        ocvtp.apply(model, pruner(), keep=KEEP, backend="torch", precision="fp16")
