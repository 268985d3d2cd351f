"""The area-weighted error against a loop that follows its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocvtp_kernels.reconstruction import area_weighted_mse
from tests.conftest import relative_error


def oracle(
    recon: torch.Tensor, x: torch.Tensor, attention: torch.Tensor, empty: str, power: float, cap: float
) -> torch.Tensor:
    losses = []
    for y, target, weights in zip(recon.double(), x.double(), attention.double(), strict=True):
        slots, tokens = weights.shape
        owner = [max(range(slots), key=lambda k, n=n: (weights[k, n].item(), -k)) for n in range(tokens)]
        area = [owner.count(k) / tokens for k in range(slots)]
        weight = [max(a, 1e-8) ** -power for a in area]
        if empty == "exclude":
            weight = [w if a > 0 else 0.0 for w, a in zip(weight, area, strict=True)]
            mean = sum(weight) / sum(a > 0 for a in area)
        else:
            mean = sum(weight) / slots
        weight = [min(w / mean, cap) for w in weight]
        omega = [sum(weights[k, n].item() * weight[k] for k in range(slots)) for n in range(tokens)]
        error = [(y[n] - target[n]).square().mean() for n in range(tokens)]
        losses.append(sum(o * e for o, e in zip(omega, error, strict=True)) / max(sum(omega), 1e-8))
    return torch.stack(losses)


def random_problem(
    batch: int, slots: int, tokens: int, sharpness: float, seed: int
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    recon, x = (torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = sharpness * torch.randn(batch, slots, tokens, generator=generator, dtype=torch.float64)
    return recon, x, logits.softmax(dim=1)


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from([0.1, 3.0]),
    st.sampled_from(["exclude", "official"]),
    st.integers(0, 1000),
)
def test_equals_the_definition(
    batch: int, slots: int, tokens: int, sharpness: float, empty: str, seed: int
) -> None:
    problem = random_problem(batch, slots, tokens, sharpness, seed)
    for power, cap in ((0.5, 10.0), (1.0, 1.5)):
        loss = area_weighted_mse(*problem, empty_slots=empty, reduction="none", power=power, cap=cap)
        assert relative_error(loss, oracle(*problem, empty, power, cap)) <= 1e-12
    assert torch.equal(area_weighted_mse(*problem), area_weighted_mse(*problem, reduction="none").mean())


@pytest.mark.parametrize("empty", ["exclude", "official"])
def test_of_slots_that_attend_alike_the_lowest_owns(empty: str) -> None:
    recon, x, attention = random_problem(2, 6, 40, 1.0, 0)
    attention = (4 * attention).round() / 4
    assert ((attention == attention.amax(dim=1, keepdim=True)).sum(dim=1) > 1).any()
    loss = area_weighted_mse(recon, x, attention, empty_slots=empty, reduction="none")
    assert relative_error(loss, oracle(recon, x, attention, empty, 0.5, 10.0)) <= 1e-12


@pytest.mark.parametrize("empty", ["exclude", "official"])
def test_gradient(empty: str) -> None:
    recon, x, attention = random_problem(2, 6, 10, 3.0, 0)
    recon.requires_grad_()
    x.requires_grad_()
    attention.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, t: area_weighted_mse(y, t, attention, empty_slots=empty, reduction="none"), (recon, x)
    )
    area_weighted_mse(recon, x, attention, empty_slots=empty).backward()
    assert attention.grad is None


def test_empty_slots_swallow_the_official_loss() -> None:
    """Two slots own the tokens, ten own none: officially those ten set almost every token's weight."""
    attention = torch.full((1, 12, 8), 0.01, dtype=torch.float64)
    attention[0, 0, :6] = attention[0, 1, 6:] = 0.89
    recon, x = torch.zeros(1, 8, 3, dtype=torch.float64), torch.zeros(1, 8, 3, dtype=torch.float64)
    recon[0, 6:] = 1.0  # the small object is wrong
    official = area_weighted_mse(recon, x, attention, empty_slots="official")
    exclude = area_weighted_mse(recon, x, attention, empty_slots="exclude")
    assert official < 0.27  # about its bare share of tokens, 2 / 8
    assert exclude > 0.35  # lifted, as the area weight means it to be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_accumulate_in_single(dtype: torch.dtype) -> None:
    recon, x, attention = random_problem(2, 4, 50, 1.0, 0)
    loss = area_weighted_mse(recon.to(dtype), x.to(dtype), attention.to(dtype))
    assert loss.dtype == torch.float32
    exact = area_weighted_mse(*(t.to(dtype).double() for t in (recon, x, attention)))
    assert relative_error(loss, exact) <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.rand(2, 5, 4)}, "features must have shape"),
        ({"slot_attention": torch.rand(2, 3, 6)}, "slot_attention must have shape"),
        ({"empty_slots": "drop"}, "empty_slots must be"),
        ({"reduction": "sum"}, "reduction must be"),
        ({"power": float("nan")}, "power must be a finite number; got nan"),
        ({"cap": 0.0}, "cap must be a positive number; got 0.0"),
        ({"cap": float("nan")}, "cap must be a positive number"),
        ({"features": torch.rand(2, 5, 3, device="meta")}, "features is on meta, reconstruction on cpu"),
        ({"slot_attention": torch.rand(2, 3, 5, device="meta")}, "slot_attention is on meta"),
        ({"slot_attention": torch.rand(2, 0, 5)}, "nothing to compare"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {
        "reconstruction": torch.rand(2, 5, 3),
        "features": torch.rand(2, 5, 3),
        "slot_attention": torch.rand(2, 3, 5),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        area_weighted_mse(**arguments)
