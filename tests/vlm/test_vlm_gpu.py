"""The patch on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.encode.encode import encode, prune_rows
from tests.vlm.family import Family, families
from tests.vlm.tiny_llava import GREEDY, KEEP, llava, mixed, pixels, pruner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def to_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """PyTorch raises where its host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_raises() -> None:
    x = torch.ones(3, device="cuda")
    with never_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_pruner_never_waits(backend: str, refine: int) -> None:
    chooser = pruner().cuda()
    features, fill = torch.randn(3, 16, chooser.config.in_dim).cuda(), torch.rand(3, 16).cuda()
    want = chooser(features, KEEP, fill, backend=backend, refine=refine)  # folds weights, compiles kernels
    with never_waiting():
        got = chooser(features, KEEP, fill, backend=backend, refine=refine)
    assert torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("capture", [False, True])
@torch.no_grad()
def test_the_vision_side_never_waits(capture: bool) -> None:
    """From pixels to projected rows: tower, choice, projector."""
    model, pictures = llava().half().cuda(), pixels(2).half().cuda()
    ocvtp.apply(model, pruner(), keep=KEEP, backend="triton", capture=capture)
    controller = controller_of(model)

    def rows() -> torch.Tensor:
        kept = encode(controller.adapter, {"pixel_values": pictures}, controller.settings, None)
        return kept["image"].flat()

    for _ in range(4):  # as it is, twice; captured; replayed
        want = rows()
    with never_waiting():
        got = rows()
    assert torch.equal(got, want)
    ocvtp.remove(model)


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in families()])
@torch.no_grad()
def test_images_of_two_sizes_never_wait(family: Family) -> None:
    """All images of the family's rows at once, which are of several sizes where it tells them apart.

    What says how big they are stays on the host, where processors make it.
    """
    model, names = family.model().half().cuda(), family.pixels["image"]
    given = {name: value for name, value in family.batch().items() if name in names}
    given[names[0]] = given[names[0]].half().cuda()
    ocvtp.apply(model, family.pruner(), keep=family.keep, backend="triton")
    controller = controller_of(model)

    def kept() -> torch.Tensor:
        vision = controller.adapter.vision("image", given, controller.settings)  # may ask how many are real
        with never_waiting():
            return prune_rows(vision, controller.settings).flat()

    for _ in range(3):  # compiles, folds weights and captures, which may wait
        encode(controller.adapter, given, controller.settings, None)
    want = encode(controller.adapter, given, controller.settings, None)["image"].flat()
    assert torch.equal(kept(), want)
    ocvtp.remove(model)


def test_a_model_that_moved(route: str, positions: str) -> None:
    model, batch = llava(), mixed()[0]
    ocvtp.apply(model, pruner(), keep=KEEP, positions=positions)
    want_indices = ocvtp.vlm.select(model, batch["pixel_values"]).indices
    want = model(**batch).logits
    model.cuda()
    got_indices = ocvtp.vlm.select(model, batch["pixel_values"].cuda()).indices
    assert torch.equal(got_indices.cpu(), want_indices)
    torch.testing.assert_close(model(**to_gpu(batch)).logits.cpu(), want, atol=1e-2, rtol=1e-2)
    out = model.generate(**to_gpu(batch), **GREEDY)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]].cpu(), batch["input_ids"])


def test_keeping_all_changes_no_bit_in_half_precision(route: str) -> None:
    model, batch = llava().bfloat16().cuda(), to_gpu(mixed()[0])
    with torch.no_grad():
        want = model(**batch).logits
    ids = model.generate(**batch, **GREEDY)
    ocvtp.apply(model, pruner(), keep=16)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want)
    assert torch.equal(model.generate(**batch, **GREEDY), ids)


def test_stage_times_on_a_gpu() -> None:
    model, batch = llava().cuda(), to_gpu(mixed()[0])
    ocvtp.apply(model, pruner(), keep=KEEP)
    with ocvtp.vlm.stage_times(model) as times:
        model.generate(**batch, **GREEDY)
    assert all(value > 0 for value in times.values())


def test_captured_and_overlapped_calls_keep_the_same_tokens() -> None:
    model, batch = llava().half().cuda(), to_gpu(mixed()[0])
    ocvtp.apply(model, pruner(), keep=KEEP, backend="torch")
    want = ocvtp.vlm.select(model, batch["pixel_values"]).indices
    report = ocvtp.apply(model, pruner(), keep=KEEP, backend="triton", precision="fp32")
    assert report.captured
    for _ in range(5):  # as it is, twice; captured; replayed twice
        assert torch.equal(ocvtp.vlm.select(model, batch["pixel_values"]).indices, want)
    out = [model.generate(**batch, **GREEDY) for _ in range(2)]
    assert torch.equal(*out)
    ocvtp.remove(model)


STEADY = [pytest.param(family, id=family.name) for family in families() if not family.mrope]


@pytest.mark.parametrize("family", STEADY)
@torch.no_grad()
def test_a_replayed_vision_side_has_the_bits_of_the_one_that_ran(family: Family) -> None:
    """Over changing pixels of two shapes, and changed weights; and nobody waits for it."""
    model, chooser, names = family.model().half().cuda(), family.pruner(), family.pixels["image"]
    rows = [row for row in family.rows().values() if names[0] in row]
    shapes = [to_gpu_but_sizes({name: row[name] for name in names if name in row}, names[0]) for row in rows]
    report = ocvtp.apply(model, chooser, keep=family.keep, backend="triton", capture="vision")
    assert report.vision_captured
    controller = controller_of(model)

    def check(times: int) -> None:
        before = []
        for step in range(times):
            for given in shapes:
                pixels = given[names[0]] * (1 + step)
                vision = controller.adapter.vision("image", {**given, names[0]: pixels}, controller.settings)
                want = prune_rows(vision, controller.settings)
                got = encode(controller.adapter, {**given, names[0]: pixels}, controller.settings, None)[
                    "image"
                ]
                before.append((got, want))
        for got, want in before:  # later replays left them alone
            assert all(map(torch.equal, got.tensors(), want.tensors()))
            assert torch.equal(got.slots, want.slots)
            assert got.totals == want.totals
            assert got.mass is None or torch.equal(got.mass, want.mass)

    graphs = controller.settings.graphs
    check(5)
    assert graphs.graphs == len(shapes)
    next(iter(controller.adapter.tower.parameters())).mul_(1.5)  # in place: replays see it
    check(1)
    assert graphs.graphs == len(shapes)
    chooser.slot_mean.add_(0.5)  # folded weights: recorded anew
    check(4)
    assert graphs.graphs == len(shapes)
    vision = controller.adapter.vision("image", shapes[0], controller.settings)
    with never_waiting():
        graphs.rows(vision, lambda _: pytest.fail("it was to be replayed"))
    ocvtp.remove(model)
    assert graphs.graphs == 0


def to_gpu_but_sizes(given: dict[str, Any], pixels: str) -> dict[str, Any]:
    return {**given, pixels: given[pixels].half().cuda()}


def test_a_replayed_vision_side_answers_the_same_from_threads() -> None:
    model, batch = llava().half().cuda(), mixed()[0]
    batches = [to_gpu({**batch, "pixel_values": pixels(3, seed).half()}) for seed in range(3)]
    ocvtp.apply(model, pruner(), keep=KEEP, backend="triton")
    want = [model.generate(**batch, **GREEDY) for batch in batches]
    ocvtp.apply(model, pruner(), keep=KEEP, backend="triton", capture="vision")
    for _ in range(2):
        assert all(map(torch.equal, [model.generate(**batch, **GREEDY) for batch in batches], want))
    assert controller_of(model).settings.graphs.graphs == 1

    def answer(batch: dict[str, Any]) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            made = model.generate(**batch, **GREEDY)
            torch.cuda.current_stream().synchronize()
            return made

    torch.cuda.synchronize()
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(answer, batches * 4))
    assert all(map(torch.equal, got, want * 4))
    ocvtp.remove(model)


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in families()])
@torch.no_grad()
def test_every_family_on_a_gpu(family: Family) -> None:
    """All kept: the same bits. Pruned: as on the CPU, alone as in a batch, and again when replayed."""
    model, pruner, rows = family.model(), family.pruner(), list(family.rows().values())
    batch = family.batch()
    live = batch["attention_mask"].bool()
    ocvtp.apply(model, pruner, keep=family.keep, backend="torch")
    want = model(**batch).logits
    ocvtp.remove(model)
    model.cuda()
    on_gpu = to_gpu(batch)
    unpruned = model(**on_gpu).logits[live.cuda()]
    ocvtp.apply(model, pruner, keep=1.0)
    assert torch.equal(model(**on_gpu).logits[live.cuda()], unpruned)
    ocvtp.apply(model, pruner, keep=family.keep, precision="fp32")
    width = batch["input_ids"].shape[1]
    for _ in range(4):  # as it is, twice; captured; replayed
        torch.testing.assert_close(model(**on_gpu).logits[:, -1].cpu(), want[:, -1], atol=1e-2, rtol=1e-2)
        out = model.generate(**on_gpu, **GREEDY)
        for i, row in enumerate(rows):
            alone = model.generate(**to_gpu(row), **GREEDY)
            assert torch.equal(alone[0, row["input_ids"].shape[1] :], out[i, width:])
    ocvtp.remove(model)
