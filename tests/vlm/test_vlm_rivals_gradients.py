"""Training through methods that merge: the vision side learns from their rows as from kept ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.rivals.catalog import METHODS
from ocvtp.vlm.towers.tome import run_merging_tower
from tests.vlm.family import Inputs, by_name
from tests.vlm.tiny_llava import ONE, TOKENS, llava, pixels, prompt

FAMILIES = {"llava": 6, "llava_next": 12, "qwen2_5_vl": 5}  # and a budget below all of their images
MERGING = [name for name, kind in METHODS.items() if kind.merges]
CASES = [(family, name) for family in FAMILIES for name in MERGING]
#: Their rows are sums weighted by attention, which counts as a constant.
CONSTANT = ("prumerge", "prumerge+")


def method(name: str) -> str | Reducer:
    return METHODS[name]("language_model") if name == "trim" else name  # type: ignore[call-arg]


def vision(model: Any) -> dict[str, torch.nn.Parameter]:
    """Of tower, and projector or merger."""
    sides = ("vision_tower", "multi_modal_projector", "visual")
    return {name: p for name, p in model.named_parameters() if any(f".{side}." in name for side in sides)}


def trained(model: Any, row: Inputs) -> dict[str, torch.Tensor]:
    """Gradients where nothing but the vision side is trained."""
    model.requires_grad_(False)
    for parameter in vision(model).values():
        parameter.requires_grad_()
    model.zero_grad(set_to_none=True)
    labels = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
    model(**row, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in vision(model).items() if p.grad is not None}


def check(found: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> None:
    assert like
    assert found.keys() >= like.keys()
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        # The same number added to all keys changes no attention.
        assert grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_vision_side_is_trained(family: str, name: str) -> None:
    model, row = by_name(family).model(), by_name(family).rows()["two"]
    ocvtp.apply(model, "hiprune", keep=FAMILIES[family])
    choosing = trained(model, row)
    ocvtp.apply(model, method(name), keep=FAMILIES[family])
    check(trained(model, row), choosing)


@pytest.mark.parametrize("name", [name for name in MERGING if name != "tome"])
def test_towers_without_a_class_token_are_trained(name: str) -> None:
    model = llava(tower="siglip", strategy="full", layer=-1)
    ocvtp.apply(model, "divprune", keep=6)
    choosing = trained(model, prompt(ONE, pixels(1)))
    ocvtp.apply(model, method(name), keep=6)
    check(trained(model, prompt(ONE, pixels(1))), choosing)


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in CASES if n not in CONSTANT])
def test_gradients_are_those_of_numbers(family: str, name: str) -> None:
    model = by_name(family).model().double()
    row = {
        key: value.double() if value.is_floating_point() else value
        for key, value in by_name(family).rows()["one"].items()
    }
    ocvtp.apply(model, method(name), keep=FAMILIES[family])
    found = trained(model, row)
    labels = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
    length = torch.stack([grad.norm() for grad in found.values()]).norm()
    losses = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):  # uphill, and to the other side
            for key, grad in found.items():
                vision(model)[key].add_(grad / length, alpha=step)
            losses.append(float(model(**row, labels=labels).loss))
    # The language model's norms are computed in float32 whatever it was cast to.
    assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(float(length), rel=0.01)


@pytest.mark.parametrize("proportional", [True, False])
def test_a_merging_tower_is_differentiable_from_end_to_end(proportional: bool) -> None:
    tower = llava().model.vision_tower
    images = pixels(2).requires_grad_()
    merged = run_merging_tower(tower, images, [3, 0, 2, 1, 4], proportional=proportional)
    assert merged.rows.shape[1] == TOKENS - 10
    assert not merged.sizes.requires_grad
    merged.rows.square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()
    unread = ("layers.5.", "post_layernorm")
    for name, parameter in tower.named_parameters():
        if any(part in name for part in unread):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_a_merging_tower_without_merging_has_the_towers_gradients() -> None:
    tower = llava().model.vision_tower
    grads = []
    for run in (
        lambda: run_merging_tower(tower, pixels(2), [0] * 5).rows,
        lambda: tower(pixels(2), output_hidden_states=True).hidden_states[5][:, 1:],
    ):
        tower.zero_grad(set_to_none=True)
        run().square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained(name: str, dtype: torch.dtype) -> None:
    model = llava().to(dtype)
    ocvtp.apply(model, method(name), keep=6)
    found = trained(model, prompt(ONE, pixels(1).to(dtype)))
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in found.values())
    assert sum(bool(grad.abs().max() > 0) for grad in found.values()) > len(found) // 2
