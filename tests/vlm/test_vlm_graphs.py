"""The whole vision side recorded and replayed, on a rehearsed lane: what the graph does, and who keeps it."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.pruner.assignment import Plan
from ocvtp.pruner.lane import CudaLane
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.contracts.rows import KeptRows
from ocvtp.vlm.encode import graphs
from ocvtp.vlm.encode.encode import encode, prune_rows
from ocvtp.vlm.encode.graphs import VisionGraphs
from ocvtp.vlm.encode.watched import Watched, why_unsteady
from ocvtp.vlm.towers.clip import root
from tests.fake_cuda import FakeCuda
from tests.far import FarLine
from tests.rehearsal import Rehearsal
from tests.vlm.family import Family, by_name, families
from tests.vlm.tiny_llava import GREEDY, KEEP, LAYERS, ONE, llava, pixels, prompt, pruner

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="rehearsed on the CPU; test_vlm_gpu.py has the real thing"
)

OPTIONS: dict[str, Any] = {"keep": KEEP, "backend": "torch", "capture": "vision"}
SIGHTINGS = 3


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Rehearsal]:
    """Lanes of vision sides made during the test: where graphs run, then where branches are recorded."""
    lanes: list[Rehearsal] = []

    def lane_for(device: torch.device) -> Rehearsal:
        lanes.append(Rehearsal(device))
        return lanes[-1]

    monkeypatch.setattr("ocvtp.vlm.encode.graphs.lane_for", lane_for)
    monkeypatch.setattr("ocvtp.vlm.capturing.lane_for", Rehearsal)
    return lanes


def graphs_of(model: Any) -> VisionGraphs:
    found = controller_of(model).settings.graphs
    assert isinstance(found, VisionGraphs)
    return found


@torch.no_grad()
def kept(model: Any, images: torch.Tensor, **beside: Any) -> KeptRows:
    controller = controller_of(model)
    return encode(controller.adapter, {"pixel_values": images, **beside}, controller.settings, None)["image"]


@torch.no_grad()
def eager(model: Any, images: torch.Tensor, **beside: Any) -> KeptRows:
    controller = controller_of(model)
    given = {"pixel_values": images, **beside}
    return prune_rows(controller.adapter.vision("image", given, controller.settings), controller.settings)


def assert_same(got: KeptRows, want: KeptRows) -> None:
    assert (got.totals, len(got.rows), len(got.deep)) == (want.totals, len(want.rows), len(want.deep))
    assert all(map(torch.equal, got.tensors(), want.tensors()))
    assert torch.equal(got.slots, want.slots)
    assert got.slots.dtype == want.slots.dtype
    assert (got.mass is None) == (want.mass is None)
    if got.mass is not None and want.mass is not None:
        assert torch.equal(got.mass, want.mass)


def captured(model: Any, images: torch.Tensor, **beside: Any) -> KeptRows:
    """Call until there is a graph of these pixels."""
    for _ in range(SIGHTINGS):
        found = kept(model, images, **beside)
    return found


def test_run_then_recorded_then_replayed(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    report = ocvtp.apply(model, pruner(), **OPTIONS)
    assert report.captured
    assert report.vision_captured
    assert "one CUDA graph of the vision side" in str(report)
    results = []
    for seed in range(5):
        results.append((seed, kept(model, pixels(2, seed))))
        assert graphs_of(model).graphs == (seed >= SIGHTINGS - 1)
    assert rehearsed[0].log == [
        "run",
        "record",
        "run",
        "replay",
        "mark",
        "join",
        *["run", "replay", "mark", "join"] * 2,
    ]
    (graph,) = graphs_of(model)._graphs.values()
    assert any(isinstance(one, Plan) for one in graph.held)  # folded weights, which caches may give up
    for seed, got in results:  # earlier results are what they were
        assert_same(got, eager(model, pixels(2, seed)))


def test_answers_are_those_of_eager_calls(rehearsed: list[Rehearsal]) -> None:
    model, inputs = llava(), [{**prompt(ONE, pixels(1, seed)), **GREEDY} for seed in range(5)]
    ocvtp.apply(model, pruner(), keep=KEEP, backend="torch")
    want = [model.generate(**one) for one in inputs]
    ocvtp.apply(model, pruner(), **OPTIONS)
    assert all(map(torch.equal, (model.generate(**one) for one in inputs), want))
    assert graphs_of(model).graphs == 1
    assert rehearsed[0].log.count("replay") == 3


VARIANTS: dict[str, dict[str, Any]] = {
    "thrown away": {"merge": "off", "weigh": False},
    "before the projector": {"merge": "features"},
    "kept_rows": {"tower": "kept_rows"},
    "refined": {"refine": 1},
    "all of them": {"keep": 1.0},
    "attention": {"pruner": "attention"},
    "greedy_dpp": {"pruner": "greedy_dpp"},
    "farthest_point": {"pruner": "farthest_point"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(rehearsed: list[Rehearsal], name: str) -> None:
    model, options = llava(), {**OPTIONS, **VARIANTS[name]}
    ocvtp.apply(model, options.pop("pruner", None) or pruner(), **options)
    captured(model, pixels(2, 0))
    assert_same(kept(model, pixels(2, 5)), eager(model, pixels(2, 5)))
    assert rehearsed[0].log.count("replay") == 2


ALIKE = {"paligemma", "smolvlm"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.thorough] if one.name in ALIKE else [])
        for one in families()
        if not one.mrope
    ],
)
def test_every_family_that_can(rehearsed: list[Rehearsal], family: Family) -> None:
    """Same bits for other pixels; and none of its host data is of an earlier call."""
    model = family.model()
    ocvtp.apply(model, family.pruner(), **{**OPTIONS, "keep": family.keep})
    parts = controller_of(model).adapter.vision_parts
    names = [name for name, part in model.model.named_children() if any(part is one for one in parts)]
    assert len(names) == len(list(model.model.children())) - 1
    assert not any("language" in name or "text" in name for name in names)
    names = list(family.pixels["image"])
    rows = [row for row in family.rows().values() if "pixel_values" in row]
    given = [{name: row[name] for name in names if name in row} for row in rows]
    for beside in given:
        captured(model, **_split(beside))
    for beside in given:
        images, other = beside["pixel_values"], beside["pixel_values"].flip(-1) * 0.5
        for one in (other, images):
            changed = _split({**beside, "pixel_values": one})
            assert_same(kept(model, **changed), eager(model, **changed))
    assert graphs_of(model).graphs == len(given)
    assert rehearsed[0].log.count("replay") == 3 * len(given)


def _split(given: dict[str, Any]) -> dict[str, Any]:
    return {"images": given["pixel_values"], **{k: v for k, v in given.items() if k != "pixel_values"}}


def test_videos(rehearsed: list[Rehearsal]) -> None:
    family = by_name("llava_onevision")
    model, row = family.model(), family.rows()["video"]
    ocvtp.apply(model, family.pruner(), **{**OPTIONS, "keep": 2})
    ids = {name: row[name] for name in ("input_ids", "pixel_values_videos")}
    with torch.no_grad():
        want = model(**ids).logits
        for _ in range(3):
            assert torch.equal(model(**ids).logits, want)
    assert rehearsed[0].log.count("replay") == 2


def test_images_of_one_shape_but_other_sizes_are_kept_apart(rehearsed: list[Rehearsal]) -> None:
    """As many tiles, of which more or less only pads the picture."""
    family = by_name("llava_next")
    model = family.model()
    ocvtp.apply(model, family.pruner(), **{**OPTIONS, "keep": 6})
    tiles = torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    sizes = [torch.tensor([[60, 100]]), torch.tensor([[100, 100]])]
    lengths = set()
    for _ in range(4):
        for size in sizes:
            got = kept(model, tiles, image_sizes=size)
            assert_same(got, eager(model, tiles, image_sizes=size))
            lengths.add(got.totals)
    assert len(lengths) == 2
    assert graphs_of(model).graphs == 2


def test_shapes_have_graphs_of_their_own_and_the_least_used_goes(
    rehearsed: list[Rehearsal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr("ocvtp.pruner.admission.SIGHTINGS", 1)
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    for images in (1, 2, 1, 2):
        kept(model, pixels(images))
    assert graphs_of(model).graphs == 2
    for _ in range(5):
        assert_same(kept(model, pixels(3, 2)), eager(model, pixels(3, 2)))
    assert graphs_of(model).graphs == 2
    assert "wait" in rehearsed[0].log  # what goes may still be running


def test_per_call_arguments_and_strides_are_kept_apart(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    strided = pixels(2).to(memory_format=torch.channels_last)
    for _ in range(4):
        for images, beside in (
            (pixels(2), {}),
            (pixels(2), {"vision_feature_layer": -3}),
            (strided, {}),
        ):
            assert_same(kept(model, images, **beside), eager(model, images, **beside))
    assert graphs_of(model).graphs == 3
    replays = rehearsed[0].log.count("replay")
    model.set_attn_implementation("eager")
    assert_same(kept(model, strided), eager(model, strided))
    assert rehearsed[0].log.count("replay") == replays


@pytest.mark.parametrize(
    "change", ["in place", "replaced", "another storage", "a module", "the pruner's", "newline"]
)
def test_changed_weights_are_seen(rehearsed: list[Rehearsal], change: str) -> None:
    family = by_name("llava_next") if change == "newline" else None
    model = llava() if family is None else family.model()
    chooser = pruner() if family is None else family.pruner()
    ocvtp.apply(model, chooser, **OPTIONS)
    given: dict[str, Any] = {"images": pixels(2)}
    if family is not None:
        row = family.rows()["one"]
        given = _split({name: row[name] for name in family.pixels["image"]})
    before = captured(model, **given)
    layer = root(model.model.vision_tower).encoder.layers[0].mlp
    with torch.no_grad():
        if change == "in place":
            layer.fc1.weight.mul_(2.0)
        elif change == "replaced":
            layer.fc1.weight = torch.nn.Parameter(layer.fc1.weight * 2.0)
        elif change == "another storage":
            layer.fc1.weight.data = layer.fc1.weight * 2.0
        elif change == "a module":
            layer.fc1 = torch.nn.Linear(layer.fc1.in_features, layer.fc1.out_features).eval()
        elif change == "newline":
            model.model.image_newline = torch.nn.Parameter(model.model.image_newline * 2.0)
        else:
            chooser.slot_mean.add_(1.0)
    replays = rehearsed[0].log.count("replay")
    after = kept(model, **given)
    assert_same(after, eager(model, **given))
    assert not all(map(torch.equal, after.tensors(), before.tensors()))
    assert (rehearsed[0].log.count("replay") > replays) == (change == "in place")
    assert_same(captured(model, **given), after)  # and it is recorded anew
    assert graphs_of(model).graphs == 1


def test_no_graph_keeps_weights_that_were_replaced(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    for images in (1, 2):
        captured(model, pixels(images))
    layer = root(model.model.vision_tower).encoder.layers[0].mlp.fc1
    before = weakref.ref(layer.weight)
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    kept(model, pixels(1))
    gc.collect()
    assert before() is None
    assert graphs_of(model).graphs == 0


@pytest.mark.parametrize("chooser", ["pruner", "attention", "greedy_dpp"])
def test_images_of_a_replay_that_are_not_finite_are_told(
    rehearsed: list[Rehearsal], far: FarLine, chooser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llava()
    ocvtp.apply(model, pruner() if chooser == "pruner" else chooser, **OPTIONS)
    kept(model, pixels(3))
    record = rehearsed[0].record

    def recorded(work: Any) -> Any:
        def unseen() -> Any:  # as in a graph, where a watch can't note anything
            far.capturing = True
            try:
                return work()
            finally:
                far.capturing = False

        return record(unseen)

    monkeypatch.setattr(rehearsed[0], "record", recorded)
    captured(model, pixels(3))
    watch = controller_of(model).settings.watch
    for bad in (False, True, False):
        images = pixels(3, 1)
        if bad:
            images[1, 2, 7, 7] = torch.nan
        far.arrive()
        watch.look()  # nothing was wrong so far
        replays = rehearsed[0].log.count("replay")
        got = kept(model, images)
        assert rehearsed[0].log.count("replay") == replays + 1
        far.arrive()
        if bad:
            with pytest.raises(ValueError, match=r"in this call, (image \[1\] of 3|an image): .*NaN or Inf"):
                watch.look()
        else:
            assert_same(got, eager(model, images))
    assert far.waits == 0


def test_threads_get_their_own_answers(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    inputs = [pixels(1 + seed % 2, seed) for seed in range(16)]
    want = [eager(model, one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda one: kept(model, one), inputs))
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)
    assert graphs_of(model).graphs == 2
    assert len(rehearsed) == 2  # one to replay on, one for branches


@pytest.fixture
def watching() -> Iterator[Any]:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


WHY = {
    "gradients": "gradients are wanted",
    "training": "in training mode",
    "a layer in training": "in training mode",
    "autocast": "autocast",
    "a hook": "forward hooks",
    "an adapter": "neither PyTorch's nor transformers' own",
    "a mode": "a mode of PyTorch",
    "minded": "accelerate or FSDP",
}


@pytest.mark.parametrize("why", WHY)
def test_calls_that_are_run_as_ever(
    rehearsed: list[Rehearsal], why: str, caplog: pytest.LogCaptureFixture, watching: Any
) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    tower, images = model.model.vision_tower, pixels(1)
    layer = root(tower).encoder.layers[1]
    calls: list[int] = []
    if why == "training":
        tower.train()
    elif why == "a layer in training":
        layer.train()
    elif why == "a hook":
        layer.register_forward_hook(lambda *_: calls.append(1))
    elif why == "an adapter":
        layer.mlp.fc1.__class__ = type("Lora", (torch.nn.Linear,), {"__module__": "peft.tuners"})
    elif why == "minded":
        layer._hf_hook = object()
    controller = controller_of(model)
    with caplog.at_level(logging.WARNING, logger="ocvtp"), torch.set_grad_enabled(why == "gradients"):
        for _ in range(5):
            with torch.autocast("cpu", enabled=why == "autocast"):
                if why == "a mode":
                    with watching:
                        found = encode(
                            controller.adapter, {"pixel_values": images}, controller.settings, None
                        )
                    assert watching.get_total_flops() > 0
                else:
                    found = encode(controller.adapter, {"pixel_values": images}, controller.settings, None)
    assert graphs_of(model).graphs == 0
    assert found["image"].rows[0].requires_grad == (why == "gradients")
    (record,) = caplog.records
    assert WHY[why] in record.message
    assert len(calls) == (5 if why == "a hook" else 0)


def test_a_hook_that_is_put_on_later_fires(rehearsed: list[Rehearsal]) -> None:
    model, calls = llava(), []
    ocvtp.apply(model, pruner(), **OPTIONS)
    want = captured(model, pixels(1))
    handle = (
        root(model.model.vision_tower).encoder.layers[2].register_forward_hook(lambda *_: calls.append(1))
    )
    assert_same(kept(model, pixels(1)), want)
    assert calls == [1]
    assert graphs_of(model).graphs == 0
    handle.remove()
    assert_same(captured(model, pixels(1)), want)
    assert graphs_of(model).graphs == 1
    assert calls == [1]


def test_a_failed_capture_costs_nothing_and_is_said_once(
    rehearsed: list[Rehearsal], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ocvtp.pruner.admission._PAUSE", 1)
    model, images = llava(), pixels(1)
    ocvtp.apply(model, pruner(), **OPTIONS)
    want = eager(model, images)
    kept(model, pixels(2))
    rehearsed[0].error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        for _ in range(12):
            assert_same(kept(model, images), want)
    assert rehearsed[0].attempts == 2
    assert [record.message for record in caplog.records] == [
        'capture="vision": the vision side runs without a CUDA graph: it can\'t be captured here: operation '
        "not permitted when stream is capturing"
    ]
    rehearsed[0].error = None
    captured(model, images)
    assert graphs_of(model).graphs == 0


def test_a_failure_that_passes_is_tried_again(
    rehearsed: list[Rehearsal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ocvtp.pruner.admission._PAUSE", 1)
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    want = eager(model, pixels(1))
    kept(model, pixels(2))
    rehearsed[0].error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(4):
        assert_same(kept(model, pixels(1)), want)
    assert rehearsed[0].attempts
    rehearsed[0].error = None
    for _ in range(4):
        assert_same(kept(model, pixels(1)), want)
    assert graphs_of(model).graphs == 1


def test_timing_and_selecting_run_it(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    captured(model, pixels(1))
    log = list(rehearsed[0].log)
    with ocvtp.vlm.stage_times(model) as times:
        model.generate(**prompt(ONE, pixels(1)), **GREEDY)
    ocvtp.vlm.select(model, pixels(1))
    assert rehearsed[0].log == log
    assert times["pruner"] > 0


def test_inference_mode_does_not_stick(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    controller = controller_of(model)
    with torch.inference_mode():
        for seed in range(4):
            encode(controller.adapter, {"pixel_values": pixels(1, seed)}, controller.settings, None)
    assert_same(kept(model, pixels(1, 7)), eager(model, pixels(1, 7)))
    assert graphs_of(model).graphs == 1


def test_remove_and_apply_free_graphs_and_copies_start_empty(rehearsed: list[Rehearsal]) -> None:
    model = llava()
    ocvtp.apply(model, pruner(), **OPTIONS)
    captured(model, pixels(1))
    first = graphs_of(model)
    twin = copy.deepcopy(model)
    assert graphs_of(twin).graphs == 0
    with torch.no_grad():
        root(twin.model.vision_tower).encoder.layers[0].mlp.fc1.weight.mul_(2.0)
    assert_same(captured(twin, pixels(1)), eager(twin, pixels(1)))
    assert graphs_of(twin)._parts[0] is twin.model.vision_tower
    with ocvtp.pruned(model, pruner(), **OPTIONS):
        captured(model, pixels(1))
        inner = graphs_of(model)
        assert inner.graphs == 1
    assert inner.graphs == 0
    assert first.graphs == 1
    ocvtp.apply(model, pruner(), keep=KEEP)
    assert first.graphs == 0
    assert controller_of(model).settings.graphs is None
    ocvtp.remove(model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rival": ({"pruner": "visionzip"}, "may ask the host"),
    "random": ({"pruner": "random"}, "the host tells"),
    "auto": ({"keep": "auto", "max_error": 0.5, "budgets": (2, 4)}, "how long the prompt is"),
    "word": ({"capture": "all"}, "capture must be"),
    "nobody": ({"pruner": None, "inside": True}, "capture: for a pruner"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_recorded_is_refused(rehearsed: list[Rehearsal], name: str) -> None:
    from ocvtp.methods.in_llm import FastV

    given, words = REFUSED[name]
    options = {**OPTIONS, **given}
    if options.get("inside"):
        options = {"pruner": None, "inside": FastV(layer=1, keep=4), "capture": "vision"}
    options.setdefault("pruner", pruner())
    model = llava()
    with pytest.raises(ValueError, match=words):
        ocvtp.apply(model, **options)
    assert "forward" not in model.__dict__


def test_models_that_can_not_be_recorded_are_refused(rehearsed: list[Rehearsal]) -> None:
    qwen = by_name("qwen2_5_vl")
    with pytest.raises(ValueError, match="differ in size"):
        ocvtp.apply(qwen.model(), qwen.pruner(), **{**OPTIONS, "keep": qwen.keep})
    rows = by_name("llava_next")
    with pytest.raises(ValueError, match="how long the prompt is"):
        ocvtp.apply(rows.model(), rows.pruner(), **OPTIONS, newlines="rows")
    hooked = llava()
    root(hooked.model.vision_tower).encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hooks"):
        ocvtp.apply(hooked, pruner(), **OPTIONS)
    chooser = pruner()
    chooser.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks"):
        ocvtp.apply(llava(), chooser, **OPTIONS)


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is on cpu: move the model to a CUDA GPU first; or capture=True"):
        ocvtp.apply(llava(), pruner(), **OPTIONS)


@pytest.mark.thorough
def test_the_slot_loop_is_a_branch_of_the_graph(rehearsed: list[Rehearsal], lanes: list[Rehearsal]) -> None:
    """It forks off where its layer is done, scores follow it, and both join: on a lane of the recording."""
    pytest.importorskip("triton")
    model = llava()
    ocvtp.apply(model, pruner(layer=1), **{**OPTIONS, "backend": "triton", "precision": "fp32"})
    controller = controller_of(model)
    want = eager(model, pixels(1))
    own = [lane.log.copy() for lane in lanes]
    order: list[str] = []
    for index, layer in enumerate(root(model.model.vision_tower).encoder.layers):
        layer.register_forward_pre_hook(
            lambda *_, i=index: order.append(f"{i} after {len(rehearsed[1].log)}")
        )
    held: list[object] = []
    with torch.no_grad(), graphs.forking(rehearsed_lane(rehearsed), held):
        vision = controller.adapter.vision("image", {"pixel_values": pixels(1)}, controller.settings)
        got = prune_rows(vision, controller.settings)
    assert_same(got, want)
    assert rehearsed[1].log == ["run", "mark"] * 2 + ["join"] * 2
    assert [lane.log for lane in lanes] == own  # runners' own lanes are not recorded
    assert order == [
        "0 after 0",
        "1 after 0",
        *(f"{i} after 2" for i in range(2, LAYERS - 2)),
        f"{LAYERS - 2} after 4",
    ]
    assert len(held) == 1  # the plan: weights and constants that the graph reads


def rehearsed_lane(rehearsed: list[Rehearsal]) -> Rehearsal:
    while len(rehearsed) < 2:
        rehearsed.append(Rehearsal(torch.device("cpu")))
    return rehearsed[1]


def test_what_is_watched() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).eval()
    folded = torch.nn.Linear(2, 2).eval()
    watched = Watched([module], [], [folded])
    with torch.no_grad():
        module[0].weight.add_(1.0)
    assert watched.same()
    assert watched.wants_gradients()
    with torch.no_grad():
        folded.weight.add_(1.0)
    assert not watched.same()


@pytest.mark.parametrize("fails", [[], ["begin"], ["end"], ["instantiate"]])
def test_streams_fork_and_join_in_one_recording(monkeypatch: pytest.MonkeyPatch, fails: list[str]) -> None:
    """On the real lanes over a fake of torch.cuda: what a failed recording leaves behind is nothing."""
    pytest.importorskip("triton")
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr("ocvtp.pruner.lane._wrecks", [])
    monkeypatch.setattr("ocvtp.pruner.lane._streams", weakref.WeakSet())
    monkeypatch.setattr("ocvtp.vlm.encode.graphs.lane_for", CudaLane)
    monkeypatch.setattr("ocvtp.vlm.capturing.lane_for", Rehearsal)
    monkeypatch.setattr("ocvtp.pruner.admission.SIGHTINGS", 1)
    model = llava()
    kernels = {} if fails else {"backend": "triton", "precision": "fp32"}  # which take a second to interpret
    ocvtp.apply(model, pruner(layer=1), **{**OPTIONS, **kernels})
    want = eager(model, pixels(1))
    cuda.log.clear()
    cuda.fails = list(fails)
    got = kept(model, pixels(1))
    assert_same(got, want)
    assert cuda.left() == []
    assert graphs_of(model).graphs == (not fails)
    streams = [line for line in cuda.log if not line.startswith("kept")]
    ocvtp.remove(model)
    gc.collect()  # the graph, while its fake is there
    if fails:
        assert not any(line.startswith("the host waits") for line in streams)
        return
    branch = ["side 2 waits for side 1"] * 2 + ["side 1 waits for mark of side 2"] * 2  # slots and scores
    assert streams == [
        "side 1 waits for stream 0 of 0",  # once to compile and load
        *branch,
        "record on side 1",
        *branch,
        "recorded",
        "side 1 waits for stream 0 of 0",
        "replay on side 1",
        "stream 0 of 0 waits for mark of side 1",
    ]


def test_hooks_of_accelerate_that_are_gone_again() -> None:
    """They leave each module its class's own ``forward`` on the instance: that is no other one."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = llava()
    tower = model.model.vision_tower
    hooks.add_hook_to_module(tower, hooks.ModelHook())
    assert why_unsteady([tower], training=True) is not None
    hooks.remove_hook_from_module(tower)
    assert "forward" in vars(tower)
    assert why_unsteady([tower], training=True) is None
    tower.forward = lambda *_, **__: None
    assert why_unsteady([tower], training=True) is not None
