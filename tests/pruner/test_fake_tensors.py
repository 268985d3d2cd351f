"""The pruner where tensors have no values: fake tensors, traces, exported programs, and transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ocvtp import OCPruner
from tests.conftest import SMALL, make_pruner

FEATURES = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
FILL = torch.rand(2, 20, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2))
#: options, tensors
CALLS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "keep": ({"keep": 8}, {}),
    "fill scores": ({"keep": 8}, {"fill_scores": FILL}),
    "share": ({"keep": 0.4}, {"fill_scores": FILL}),
    "auto": ({"keep": "auto", "max_error": 0.5, "budgets": [4, 8]}, {}),
    "refined": ({"keep": 8, "refine": 1, "coverage": True}, {}),
    "noise": ({"keep": 8, "return_attention": True, "batch_invariant": False}, {"noise": NOISE}),
}


class Choice(torch.nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.pruner = make_pruner()
        self.options, _ = CALLS[call]

    def forward(self, features: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        found = self.pruner(features, **self.options, **tensors)
        return found.indices, found.from_slots


@pytest.mark.filterwarnings("ignore:.*images miss max_error")
@pytest.mark.parametrize("real_pruner", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors(call: str, real_pruner: bool) -> None:
    options, tensors = CALLS[call]
    pruner = make_pruner()
    with FakeTensorMode(allow_non_fake_inputs=real_pruner) as mode:
        if not real_pruner:
            pruner = OCPruner(SMALL).eval()
        fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        found = pruner(mode.from_tensor(FEATURES), **options, **fakes)
    real = make_pruner()(FEATURES, **options, **tensors)
    assert found.indices.shape == real.indices.shape
    if real_pruner:  # and no fake weight stays in it
        assert torch.equal(pruner(FEATURES, **options, **tensors).indices, real.indices)


@pytest.mark.filterwarnings("ignore:.*images miss max_error")
@pytest.mark.parametrize(
    ("call", "strict"),
    [
        *(pytest.param(call, False, marks=pytest.mark.thorough) for call in ("keep", "fill scores")),
        *((call, False) for call in ("share", "auto", "refined", "noise")),  # with what those have, and more
        *(("share", True), ("auto", True)),
    ],
)
def test_exported(call: str, strict: bool) -> None:
    _, tensors = CALLS[call]
    program = torch.export.export(Choice(call), (FEATURES, tensors), strict=strict)
    other = FEATURES.flip(1)
    assert all(map(torch.equal, program.module()(other, tensors), Choice(call)(other, tensors)))


def test_an_exported_program_still_checks_its_input() -> None:
    program = torch.export.export(Choice("keep"), (FEATURES, {}))
    bad = FEATURES.clone()
    bad[1, 3, 5] = torch.nan
    # What is exported switches gradients off and on again, but not if it fails in between.
    with torch.enable_grad(), pytest.raises(RuntimeError, match="NaN or Inf"):
        program.module()(bad, {})


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap of grad"])
def test_transforms_leave_nothing_in_the_pruner(transform: str) -> None:
    pruner = make_pruner()
    want = make_pruner()(FEATURES, 8).indices

    def total(features: torch.Tensor) -> torch.Tensor:
        found = pruner(features, 8)
        return found.gather(features).sum()

    several = torch.stack([FEATURES, FEATURES.flip(0)])
    run = {
        "grad": lambda: torch.func.grad(total)(FEATURES),
        "jvp": lambda: torch.func.jvp(total, (FEATURES,), (FEATURES,))[1],
        "vmap": lambda: torch.func.vmap(total)(several),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(total))(several)[0],
    }[transform]
    got = run()
    rows = want[:, :, None].expand(-1, -1, 48)
    if "grad" in transform:
        assert torch.equal(got, torch.zeros_like(FEATURES).scatter(1, rows, 1.0))
    else:
        torch.testing.assert_close(got.flatten()[0], FEATURES.gather(1, rows).sum())
    assert torch.equal(pruner(FEATURES, 8).indices, want)


def test_other_parameters_by_functional_call() -> None:
    """Those of a transform too: folded anew, and not kept."""
    pruner, other = make_pruner(), make_pruner(seed=1)
    want = pruner(FEATURES, 8).indices
    parameters = {name: tensor.detach() for name, tensor in other.named_parameters()}
    call = torch.func.functional_call
    assert torch.equal(call(pruner, parameters, (FEATURES, 8)).indices, other(FEATURES, 8).indices)

    def total(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        found = call(pruner, parameters, (FEATURES, 8))
        assert torch.equal(found.indices, other(FEATURES, 8).indices)
        return parameters["slot_mean"].sum()

    torch.func.grad(total)(parameters)
    assert torch.equal(pruner(FEATURES, 8).indices, want)
