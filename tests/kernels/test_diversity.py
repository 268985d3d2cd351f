"""Farthest points and the largest volume: what the public functions promise, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ocvtp_kernels.diversity import farthest_points, in_range, largest_volume

Choose = Callable[..., torch.Tensor]
CHOOSERS: dict[str, Choose] = {"farthest_points": farthest_points, "largest_volume": largest_volume}
both = pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)


def features(batch: int, tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def values(name: str, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What each step compares, ``[steps, N]``, by brute force: the best is the largest; kept tokens: -inf."""
    x = x.double()
    found = []
    for step in range(len(order)):
        kept = order[:step]
        if name == "largest_volume":
            unit = torch.nn.functional.normalize(x, dim=1)
            basis, _ = torch.linalg.qr(unit[kept].T)
            value = (unit - unit @ basis @ basis.T).square().sum(dim=1)
        elif step:
            value = (x[:, None] - x[kept]).square().sum(dim=2).amin(dim=1)
        else:
            value = -(x - x.mean(dim=0)).square().sum(dim=1)
        value[kept] = -torch.inf
        found.append(value)
    return torch.stack(found)


def assert_greedy(name: str, x: torch.Tensor, order: torch.Tensor, margin: float = 1e-4) -> None:
    """Every choice is float64's best, or as good but for ``margin``, given those before it."""
    for row, chosen in zip(x, order, strict=True):
        value = values(name, row.cpu(), chosen.cpu())
        best = value.amax(dim=1)
        assert (value.gather(1, chosen.cpu()[:, None])[:, 0] >= best - margin * best.abs()).all()


@both
def test_every_choice_is_the_best(choose: Choose) -> None:
    for x in (features(3, 31, 16), features(2, 40, 24).double() + 100.0):
        assert_greedy(choose.__name__, x, choose(x, 12, ascending=False))


@both
def test_ascending_or_in_the_order_of_choice(choose: Choose) -> None:
    x = features(3, 31, 16)
    order = choose(x, 12, ascending=False)
    assert (order.diff(dim=1) < 0).any()
    for keep in (1, 5, 12):
        assert torch.equal(choose(x, keep), order[:, :keep].sort(dim=1).values)
    for ascending in (True, False):
        assert choose(x, 31, ascending=ascending).tolist() == [list(range(31))] * 3


@both
def test_a_batch_of_none(choose: Choose) -> None:
    assert choose(torch.zeros(0, 9, 3), 4).shape == (0, 4)


@both
def test_a_choice_has_no_gradient(choose: Choose) -> None:
    assert not choose(features(2, 9, 5).requires_grad_(), 4).requires_grad


@both
def test_autocast_around_the_call_changes_nothing(choose: Choose) -> None:
    x = features(2, 100, 64) + 3.0
    expected = choose(x, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choose(x, 24), expected)


def test_in_range_by_a_power_of_two() -> None:
    x = features(3, 9, 5)
    x[1] *= 2.0**100
    x[2] = 0.0
    scaled = in_range(x)
    ratio = x[:2] / scaled[:2]
    assert torch.equal(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert (ratio[:, 0, 0].log2() % 1 == 0).all()
    assert (scaled[:2].abs().amax(dim=(1, 2)) >= 0.5).all()
    assert (scaled.abs() < 1).all()
    assert in_range(x.half()).dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("x", "keep", "error", "match"),
    [
        (torch.ones(2, 9, 3).long(), 2, TypeError, "floating point"),
        (torch.ones(9, 3), 2, ValueError, r"\[B, N, C\]"),
        (torch.ones(2, 9, 0), 2, ValueError, r"without columns: \[2, 9, 0\]"),
        (torch.ones(2, 9, 3), 0, ValueError, "keep must be between 1 and 9"),
        (torch.ones(2, 9, 3), 10, ValueError, "keep must be between 1 and 9"),
        (torch.ones(2, 9, 3), 2.0, TypeError, "keep must be an int"),
    ],
)
@both
def test_refused(choose: Choose, x: Any, keep: Any, error: type, match: str, backend: str) -> None:
    with pytest.raises(error, match=match):
        choose(x, keep, backend=backend)


@both
def test_an_unknown_backend(choose: Choose) -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        choose(torch.ones(1, 9, 3), 9, backend="cuda")


def test_tokens_kept_already_come_first() -> None:
    """As many as each image has; what follows is farthest from them, in both backends' words."""
    x = features(3, 31, 16)
    start = torch.full((3, 12), -1)
    start[0, :3] = torch.tensor([4, 30, 9])
    start[1, :12] = torch.arange(12)
    order = farthest_points(x, 12, start=start, ascending=False)
    assert torch.equal(torch.where(start >= 0, order, -1), start)
    assert torch.equal(order[2], farthest_points(x, 12, ascending=False)[2])
    for image, given in ((0, 3), (2, 0)):
        value = values("farthest_points", x[image], order[image])[given:]
        chosen = value.gather(1, order[image, given:, None])[:, 0]
        assert (chosen >= value.amax(dim=1) - 1e-4 * value.amax(dim=1).abs()).all()
    half = order[2:, :5].masked_fill(torch.arange(5) >= 2, -1)
    assert torch.equal(farthest_points(x[2:], 5, start=half), order[2:, :5].sort(dim=1).values)


def test_tokens_kept_already_of_another_shape() -> None:
    x = features(2, 9, 4)
    with pytest.raises(ValueError, match=r"\[B, keep\]"):
        farthest_points(x, 5, start=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64"):
        farthest_points(x, 5, start=torch.zeros(2, 5))
