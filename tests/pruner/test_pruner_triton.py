"""The pruner on its kernels: same tokens as in PyTorch, and the same options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp import BackendUnavailableError, OCPruner
from ocvtp.pruner import pruner as pruner_module
from tests.conftest import SMALL, make_pruner, relative_error
from tests.kernels.triton_device import DEVICE, ON_GPU

ON_KERNELS: dict[str, Any] = {"backend": "triton", "precision": "fp32"}


@pytest.fixture(scope="module")
def pruner() -> OCPruner:
    return make_pruner().to(DEVICE)


def features(images: int = 3, tokens: int = 50, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, tokens, SMALL.in_dim, generator=generator)
    x[..., 5] += 20
    return x.to(DEVICE)


def fill(images: int = 3, tokens: int = 50) -> torch.Tensor:
    return torch.rand(images, tokens, generator=torch.Generator().manual_seed(9)).to(DEVICE)


@pytest.mark.parametrize("num_slots", [None, 30])
@pytest.mark.parametrize("scores", ["given", "none"])
def test_single_precision_keeps_the_tokens_that_pytorch_keeps(
    pruner: OCPruner, num_slots: int | None, scores: str
) -> None:
    options = {"keep": 16, "fill_scores": fill() if scores == "given" else None, "num_slots": num_slots}
    got = pruner(features(), **options, **ON_KERNELS)
    want = pruner(features(), **options, backend="torch")
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.from_slots, want.from_slots)
    assert got.slot_attention is None


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_the_map_names_the_same_tokens(pruner: OCPruner, precision: str) -> None:
    options = {"keep": 16, "fill_scores": fill(), "backend": "triton", "precision": precision}
    without = pruner(features(), **options)
    with_map = pruner(features(), **options, return_attention=True)
    assert torch.equal(with_map.indices, without.indices)
    exact = make_pruner().double().to(DEVICE)(features().double(), 16, return_attention=True).slot_attention
    assert relative_error(with_map.slot_attention, exact) <= (1e-5 if precision == "fp32" else 5e-3)


def test_an_image_keeps_its_tokens_in_any_batch(pruner: OCPruner) -> None:
    together = pruner(features(4), 16, fill(4), backend="triton", precision="fp16")
    for image in range(4):
        one = slice(image, image + 1)
        alone = pruner(features(4)[one], 16, fill(4)[one], backend="triton", precision="fp16")
        assert torch.equal(alone.indices[0], together.indices[image])


def test_noise_per_image(pruner: OCPruner) -> None:
    noise = torch.randn(3, 8, SMALL.slot_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    together = pruner(features(), 8, noise=noise, **ON_KERNELS)
    assert torch.equal(together.indices, pruner(features(), 8, noise=noise, backend="torch").indices)


def test_assigning_first_and_selecting_later(pruner: OCPruner) -> None:
    want = pruner(features(), 16, fill(), **ON_KERNELS)
    assignment = pruner.assign(features(), 16, **ON_KERNELS)
    assert torch.equal(assignment.select(fill()).indices, want.indices)
    x = torch.randn(3, 50, 7, device=DEVICE, requires_grad=True)
    selection, rows = assignment.select_rows(fill(), x)
    assert torch.equal(selection.indices, want.indices)
    assert torch.equal(rows, selection.gather(x))
    rows.sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == rows.numel()
    with pytest.raises(ValueError, match="x must have shape"):
        assignment.select_rows(fill(), x[:, 1:])
    with pytest.raises(ValueError, match="fill_scores must have shape"):
        assignment.select(fill(2))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_in_one_go_are_rows_in_two(pruner: OCPruner, backend: str) -> None:
    assignment = pruner.assign(features(), 9, backend=backend)
    x = torch.randn(3, 50, 5, device=DEVICE)
    for scores in (fill(), None):
        selection, rows = assignment.select_rows(scores, x)
        assert torch.equal(selection.indices, assignment.select(scores).indices)
        assert torch.equal(rows, selection.gather(x))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compiles_without_graph_breaks(precision: str) -> None:
    torch._dynamo.reset()
    pruner = make_pruner().to(DEVICE)  # nothing folded yet
    compiled = torch.compile(pruner, fullgraph=True, backend="aot_eager")
    for images, tokens in ((2, 50), (3, 60)):
        options = {"keep": 8, "fill_scores": fill(images, tokens), "backend": "triton"}
        got = compiled(features(images, tokens), precision=precision, **options)
        want = pruner(features(images, tokens), precision=precision, **options)
        assert torch.equal(got.indices, want.indices)


def test_automatic_precision_is_the_documented_one(pruner: OCPruner) -> None:
    _, dtype, tf32 = pruner.arithmetic(DEVICE, "triton")
    assert {"fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}[
        pruner_module.DEFAULT_PRECISION
    ] == dtype
    assert tf32 == (pruner_module.DEFAULT_PRECISION == "tf32")


def test_what_kernels_cannot_take(pruner: OCPruner) -> None:
    double = make_pruner().double().to(DEVICE)
    with pytest.raises(BackendUnavailableError, match="the pruner is float64"):
        double(features(), 8, backend="triton")
    assert double(features(), 8, backend="auto").indices.shape == (3, 8)
    wide = pruner(features().double(), 8, **ON_KERNELS)  # narrowed to float32
    assert torch.equal(wide.indices, pruner(features(), 8, **ON_KERNELS).indices)


def test_nan_is_refused(pruner: OCPruner) -> None:
    """On a GPU when somebody asks, or by the next call; and the GPU goes on."""
    want = pruner(features(), 8, **ON_KERNELS).indices
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = features()
        x[1, 7, 3] = bad
        for return_attention in (False, True):
            with pytest.raises(ValueError, match="NaN or Inf"):  # noqa: PT012
                pruner(x, 8, return_attention=return_attention, **ON_KERNELS)
                assert ON_GPU
                pruner.check()
    assert torch.equal(pruner(features(), 8, **ON_KERNELS).indices, want)
