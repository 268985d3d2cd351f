"""The kernels of diversity against float64, with everything around them poisoned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels import BackendUnavailableError
from ocvtp_kernels._launch import recording
from ocvtp_kernels.diversity import farthest_points, largest_volume, reference
from ocvtp_kernels.diversity import triton as kernels
from tests.kernels.test_diversity import assert_greedy, features, values
from tests.kernels.triton_device import (
    DEVICE,
    PoisonedTorch,
    coarse_tiles,
    far_apart,
    interpreter_only,
    surrounded,
)

Choose = Callable[..., torch.Tensor]
#: Kernels, and the public function.
CHOOSERS: dict[str, tuple[Choose, Callable[..., torch.Tensor]]] = {
    "farthest_points": (kernels.farthest_points, farthest_points),
    "largest_volume": (kernels.largest_volume, largest_volume),
}
both = pytest.mark.parametrize("name", CHOOSERS)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    sizes = {
        "diversity.statistics": {"BN": 32, "BC": 16},
        "diversity.farthest": {"BM": 32, "BC": 16, "BT": 64},
        "diversity.units": {"BM": 32, "BC": 16},
        "diversity.volume": {"BM": 32, "BC": 16, "BT": 64, "BL": 4},
    }
    coarse_tiles(monkeypatch, request, sizes)


def oracle(name: str, x: torch.Tensor, keep: int) -> torch.Tensor:
    """In the order of choice, where nothing is decided by rounding."""
    chosen: torch.Tensor = getattr(reference, name)(reference.in_range(x.double()), keep)
    return chosen


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "keep"),
    [(1, 97, 21, 9), (2, 65, 40, 1), (3, 13, 3, 12), (1, 1, 1, 1), (1, 7, 5, 7)],
)
def test_the_best_at_every_step(
    name: str, batch: int, tokens: int, width: int, keep: int, dtype: torch.dtype
) -> None:
    x = features(batch, tokens, width).to(DEVICE, dtype)
    order = CHOOSERS[name][0](x, keep)
    assert order.shape == (batch, keep)
    assert order.dtype == torch.int64
    assert all(len(set(row)) == keep for row in order.tolist())
    assert ((order >= 0) & (order < tokens)).all()
    # Volumes of three dimensions are spent after three tokens; then the lowest.
    if name == "farthest_points" or keep <= width:
        assert_greedy(name, x, order)
    else:
        assert torch.equal(order, oracle(name, x, keep))


@both
@pytest.mark.usefixtures("real_tiles")
def test_the_tables_own_tiles(name: str) -> None:
    x = features(2, 70, 100).to(DEVICE)
    assert torch.equal(CHOOSERS[name][1](x, 9, backend="triton"), oracle(name, x, 9).sort(dim=1).values)


@both
@pytest.mark.parametrize("keep", [1, 7])
def test_one_program_or_many(name: str, keep: int) -> None:
    """One launch, or one for each step: the same bits."""
    x = features(1, 70, 20).to(DEVICE)
    assert torch.equal(CHOOSERS[name][0](x, keep, 0), CHOOSERS[name][0](x, keep))


@both
@pytest.mark.parametrize(("small", "launches", "programs"), [(70 * 32, 1, 1), (70 * 32 - 1, 9, 3)])
def test_launches(
    name: str, small: int, launches: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = {"BN": 32, "BM": 32, "BC": 32, "BT": 64, "BL": 4, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(kernels, "tile", lambda *_: tile)
    with recording() as made:
        CHOOSERS[name][0](features(2, 70, 32).to(DEVICE), 9, small)
    steps = [one for one in made if one.kernel.fn.__name__ in ("farthest", "volume")]
    assert [one.grid for one in steps] == [(programs, 2)] * launches
    assert len(made) == 2 + launches


@both
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    x = features(3, 45, 9).to(DEVICE)
    together = CHOOSERS[name][0](x, 5)
    assert len({tuple(row) for row in together.tolist()}) == 3
    for i in range(3):
        assert torch.equal(CHOOSERS[name][0](x[i : i + 1], 5)[0], together[i])


@both
def test_strides_and_surroundings(name: str) -> None:
    x = features(2, 37, 16).to(DEVICE)
    want = CHOOSERS[name][0](x, 4)
    for view in (
        surrounded(x),
        x.mT.contiguous().mT,
        torch.cat([x, x * torch.nan], dim=2)[:, :, :16],
        torch.cat([x[:, :1] * torch.nan, x], dim=1)[:, 1:],
        x.movedim(0, 2).contiguous().movedim(2, 0),
    ):
        assert torch.equal(view, x)
        assert torch.equal(CHOOSERS[name][0](view, 4), want)
    assert torch.equal(CHOOSERS[name][0](x[:1].expand(2, -1, -1), 4), want[:1].expand(2, -1))


@both
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_32_bits(name: str, axis: int) -> None:
    shape = [2, 6, 16]
    shape[axis] = 5
    x = features(*shape).to(DEVICE)
    assert torch.equal(CHOOSERS[name][0](far_apart(x, axis), 3), CHOOSERS[name][0](x, 3))


@both
@pytest.mark.parametrize("small", [kernels.SMALL, 0])
def test_writes_all_that_it_reads_and_nothing_else(
    name: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = features(2, 37, 11).to(DEVICE)
    want = CHOOSERS[name][0](x, 5)
    poisoned: Any = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", poisoned)
    assert torch.equal(CHOOSERS[name][0](x, 5, small), want)
    poisoned.assert_guards_intact()


@both
@pytest.mark.parametrize("scale", [2.0**125, 2.0**-130, 1.0])
def test_squares_and_sums_out_of_range(name: str, scale: float) -> None:
    """Images don't share a scale, either."""
    x = features(2, 40, 16).to(DEVICE).clamp(-3.0, 3.0)
    want = CHOOSERS[name][0](x, 6)
    if scale < 1:  # what is left of their digits
        x = x.bfloat16().float()
        want = CHOOSERS[name][0](x, 6)
    x[0] *= scale
    assert torch.equal(CHOOSERS[name][0](x, 6), want)


@both
def test_the_lowest_of_equals(name: str) -> None:
    x = torch.ones(1, 40, 3, device=DEVICE)
    assert CHOOSERS[name][0](x, 9).tolist() == [list(range(9))]
    x = features(2, 12, 16).repeat_interleave(3, dim=1).to(DEVICE)
    order = CHOOSERS[name][0](x, 14)
    assert (order[:, :12] % 3 == 0).all()  # no copy before all others
    assert order[:, 12:].tolist() == [[1, 2]] * 2


def test_equally_far_tokens() -> None:
    """Of signs, whose distances are whole numbers, and differences are exact."""
    x = features(1, 40, 8).sign().to(DEVICE)
    order = kernels.farthest_points(x, 12)[0].cpu()
    value = values("farthest_points", x[0].cpu(), order)[1:]
    assert (value == value.amax(dim=1, keepdim=True)).sum(dim=1).max() > 1
    assert torch.equal(order[1:], torch.from_numpy(value.numpy().argmax(axis=1)))


def test_of_two_as_near_the_mean_the_first() -> None:
    x = torch.tensor([0.0, 1.0, 4.75, 5.25, 9.0, 10.0], device=DEVICE)[None, :, None].repeat(1, 1, 3)
    assert kernels.farthest_points(x, 5).tolist() == [[2, 5, 0, 1, 4]]


@both
def test_tokens_of_zeros(name: str) -> None:
    x = features(2, 20, 16).to(DEVICE)
    x[:, ::4] = 0.0
    assert torch.equal(CHOOSERS[name][0](x, 8), oracle(name, x, 8))
    assert CHOOSERS[name][0](torch.zeros_like(x), 5).tolist() == [list(range(5))] * 2


def test_volumes_that_are_spent_in_many_programs() -> None:
    x = features(2, 40, 3).to(DEVICE)
    assert torch.equal(kernels.largest_volume(x, 8, 0), oracle("largest_volume", x, 8))


@both
def test_tokens_far_from_the_origin(name: str) -> None:
    """Differences lose no digits that the features have."""
    x = (features(2, 40, 16) + 1000.0).to(DEVICE)
    if name == "farthest_points":
        assert_greedy(name, x, kernels.farthest_points(x, 9))
    else:  # all volumes after the first are rounding
        assert (CHOOSERS[name][0](x, 9).sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@both
def test_nan_stays_in_its_image(name: str) -> None:
    x = features(3, 40, 16).to(DEVICE)
    want = CHOOSERS[name][0](x, 6)
    for bad in (torch.nan, torch.inf):
        x[1, 7, 2] = bad
        got = CHOOSERS[name][0](x, 6)
        assert torch.equal(got[[0, 2]], want[[0, 2]])
        assert len(set(got[1].tolist())) == 6
        assert ((got >= 0) & (got < 40)).all()


@both
@interpreter_only
def test_float64_needs_pytorch(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match=r"float32, float16 and bfloat16, not torch.float64"):
        CHOOSERS[name][1](features(1, 9, 3).double(), 2, backend="triton")


@pytest.mark.parametrize("small", [kernels.SMALL, 0])
def test_tokens_kept_already_come_first(small: int) -> None:
    x = features(3, 70, 32).to(DEVICE)
    start = torch.full((3, 9), -1, device=DEVICE)
    start[0, :3] = torch.tensor([4, 69, 9])
    start[1] = torch.arange(9)
    want = reference.farthest_points(reference.in_range(x.cpu()), 9, start.cpu())
    assert torch.equal(kernels.farthest_points(x, 9, small, start).cpu(), want)
    assert torch.equal(kernels.farthest_points(x[:1], 9, small, start[:1]).cpu(), want[:1])


@pytest.mark.parametrize("beyond", [24, 10**6, 2**32 + 5, -(2**40)])
def test_a_token_kept_already_that_is_none(beyond: int) -> None:
    """Not allowed, but no reason to take another for it by its lower bits, or to read memory not ours."""
    x = features(2, 24, 7).to(DEVICE)
    start = torch.full((2, 5), -1, device=DEVICE)
    start[1, 0] = beyond
    got = farthest_points(surrounded(x), 5, start=start, backend="triton")
    assert torch.equal(got, farthest_points(x, 5, backend="triton"))
