"""Same features, same seed, same bits: whatever the batch, the strides, and the library that multiplies."""

from __future__ import annotations

import pytest
import torch

from ocvtp import OCPruner, Selection
from tests.conftest import SMALL

pytestmark = pytest.mark.usefixtures("library")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers: transposed in memory, without a class token, batch innermost."""
    tokens = torch.cat([x[:, :1], x], dim=1)[:, 1:]
    return [x.mT.contiguous().mT, tokens, x.movedim(0, -1).contiguous().movedim(-1, 0)]


def pruned(pruner: OCPruner, x: torch.Tensor, noise: torch.Tensor | None = None) -> Selection:
    return pruner(x, 20, noise=noise, num_slots=33, refine=2, coverage=True, return_attention=True)


def assert_same(got: Selection, want: Selection, images: slice = slice(None)) -> None:
    assert torch.equal(got.slot_attention, want.slot_attention[images])
    assert torch.equal(got.indices, want.indices[images])
    assert torch.equal(got.coverage, want.coverage[images])


@pytest.mark.parametrize("given", [False, True], ids=["seed", "noise"])
def test_batch(pruner: OCPruner, given: bool) -> None:
    x, noise = randn(3, 100, SMALL.in_dim), randn(3, 33, SMALL.slot_dim) if given else None
    together = pruned(pruner, x, noise)
    for image in range(3):
        at = slice(image, image + 1)
        assert_same(pruned(pruner, x[at], None if noise is None else noise[at]), together, at)


def test_strides(pruner: OCPruner) -> None:
    x, noise = randn(3, 100, SMALL.in_dim), randn(3, 33, SMALL.slot_dim)
    want = pruned(pruner, x, noise)
    for view in layouts(x):
        assert_same(pruned(pruner, view, noise), want)
    for view in layouts(noise):
        assert_same(pruned(pruner, x, view), want)


def test_one_noise_for_all_is_the_same_noise_for_each(pruner: OCPruner) -> None:
    x, noise = randn(3, 100, SMALL.in_dim), randn(1, 33, SMALL.slot_dim)
    assert_same(pruned(pruner, x, noise.expand(3, -1, -1)), pruned(pruner, x, noise))


def test_weights_of_any_strides(pruner: OCPruner) -> None:
    """A state dict may have been trained, transposed or cut out elsewhere."""
    state = {
        name: value.T.contiguous().T if value.ndim == 2 else value
        for name, value in pruner.to_official().items()
    }
    strided = OCPruner.from_official(state)
    assert all(parameter.is_contiguous() for parameter in strided.parameters())
    x = randn(2, 100, SMALL.in_dim)
    assert_same(pruned(strided, x), pruned(pruner, x))
