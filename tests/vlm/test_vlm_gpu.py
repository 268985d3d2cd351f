"""The patch on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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

    for _ in range(3):  # as it is, captured, replayed
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
    for _ in range(4):  # as it is, captured, replayed twice
        assert torch.equal(ocvtp.vlm.select(model, batch["pixel_values"]).indices, want)
    out = [model.generate(**batch, **GREEDY) for _ in range(2)]
    assert torch.equal(*out)
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
    for _ in range(3):  # as it is, captured, replayed
        torch.testing.assert_close(model(**on_gpu).logits[:, -1].cpu(), want[:, -1], atol=1e-2, rtol=1e-2)
        out = model.generate(**on_gpu, **GREEDY)
        for i, row in enumerate(rows):
            alone = model.generate(**to_gpu(row), **GREEDY)
            assert torch.equal(alone[0, row["input_ids"].shape[1] :], out[i, width:])
    ocvtp.remove(model)
