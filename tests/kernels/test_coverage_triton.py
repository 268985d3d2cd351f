"""The kernels of coverage against float64, with everything around them poisoned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels import BackendUnavailableError, _nearest
from ocvtp_kernels._nearest_reference import centred
from ocvtp_kernels.coverage import coverage_error, refine
from ocvtp_kernels.coverage import triton as kernels
from ocvtp_kernels.coverage.reference import cover
from tests.kernels.test_coverage import KINDS, features, kept_of
from tests.kernels.triton_device import (
    DEVICE,
    NEAREST,
    PoisonedTorch,
    coarse_tiles,
    far_apart,
    interpreter_only,
    on_device,
    surrounded,
    within,
)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    sizes = {
        **NEAREST,
        "coverage.means": {"BT": 16, "BN": 32, "BC": 16},
        "coverage.away": {"BM": 32, "BC": 16},
        "coverage.choose": {"BT": 16, "BN": 32},
        "coverage.accept": {"BN": 64},
        "coverage.finish": {"BN": 64},
    }
    coarse_tiles(monkeypatch, request, sizes)


def errors_of(x: torch.Tensor, indices: torch.Tensor) -> tuple[float, float]:
    """Relative errors of the kernels and of PyTorch, both in float32, against float64."""
    want = coverage_error(x.double(), indices)
    got = (coverage_error(x, indices, backend=backend) for backend in ("triton", "torch"))
    return tuple(float(((one - want) / want).abs().max()) for one in got)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "keep"),
    [(1, 37, 21, 7), (3, 97, 16, 33), (2, 65, 40, 1), (5, 33, 3, 17), (1, 144, 17, 65)],
)
def test_error_is_as_exact_as_pytorch(
    batch: int, tokens: int, width: int, keep: int, dtype: torch.dtype
) -> None:
    x, indices = on_device(features(batch, tokens, width).to(dtype), kept_of(batch, tokens, keep))
    ours, theirs = errors_of(x, indices)
    assert ours <= within(theirs, 3e-7)


def test_a_large_mean_costs_no_more_digits_than_in_pytorch() -> None:
    ours, theirs = errors_of(*on_device(features(2, 40, 20, "far"), kept_of(2, 40, 6)))
    assert ours <= within(theirs, 3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 7, 20, 41])
def test_refined_like_the_reference(kind: str, keep: int) -> None:
    """The same tokens, or, where rounding decides, ones that cover as much."""
    x, indices = on_device(features(3, 41, 10, kind), kept_of(3, 41, keep))
    for rounds in (1, 3):
        got = refine(x, indices, rounds, backend="triton")
        error = coverage_error(x.double(), got)
        assert (error <= coverage_error(x.double(), indices) * (1 + 1e-5) + 1e-12).all()
        assert (got.diff(dim=1) > 0).all()
        if kind == "normal":
            assert torch.equal(got, refine(x.double(), indices, rounds))


def test_never_rises_in_its_own_arithmetic() -> None:
    x, indices = on_device(features(4, 50, 4, "grid").half(), kept_of(4, 50, 9))
    before = coverage_error(x, indices, backend="triton")
    for rounds in (1, 2, 4):
        after = coverage_error(x, refine(x, indices, rounds, backend="triton"), backend="triton")
        assert (after <= before).all()
        before = after


def test_one_round_moves_to_the_medoids() -> None:
    x, indices = on_device(features(2, 60, 12), kept_of(2, 60, 8))
    got = kernels.coverage(x, indices, 1)[0].sort(dim=1).values
    assert torch.equal(got, refine(x.double(), indices, 1))
    assert not torch.equal(got, indices)


@pytest.mark.usefixtures("real_tiles")
def test_the_tables_own_tiles() -> None:
    x, indices = on_device(features(2, 70, 100), kept_of(2, 70, 66))
    assert torch.equal(refine(x, indices, 1, backend="triton"), refine(x.double(), indices, 1))
    ours, theirs = errors_of(x, indices)
    assert ours <= within(theirs, 3e-7)


@pytest.mark.parametrize("rounds", [0, 2])
def test_bits_do_not_depend_on_the_batch(rounds: int) -> None:
    x, indices = on_device(features(4, 45, 9), kept_of(4, 45, 6))
    together = kernels.coverage(x, indices, rounds)
    for i in range(4):
        alone = kernels.coverage(x[i : i + 1], indices[i : i + 1], rounds)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_strides_and_surroundings() -> None:
    x, indices = on_device(features(2, 37, 11), kept_of(2, 37, 6))
    want = kernels.coverage(x, indices, 1)
    views = {
        "surrounded": (surrounded(x), surrounded(indices)),
        "channels first": (x.mT.contiguous().mT, indices.mT.contiguous().mT),
        "expanded": (x[:1].expand(2, -1, -1), indices[:1].expand(2, -1)),
    }
    for name, (features_, kept) in views.items():
        got = kernels.coverage(features_, kept, 1)
        for one, other in zip(got, want, strict=True):
            if name == "expanded":
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[0])
            else:
                assert torch.equal(one, other), name


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_32_bits(axis: int) -> None:
    shape = [2, 6, 3]
    shape[axis] = 5
    x, indices = on_device(features(*shape), kept_of(shape[0], shape[1], 2))
    got = kernels.coverage(far_apart(x, axis), indices, 1)
    assert all(map(torch.equal, got, kernels.coverage(x, indices, 1)))


def test_writes_all_of_its_memory_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices = on_device(features(3, 37, 11), kept_of(3, 37, 6))
    want = kernels.coverage(x, indices, 2)
    poisoned: Any = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", poisoned)
    monkeypatch.setattr(_nearest, "torch", poisoned)
    got = kernels.coverage(x, indices, 2)
    assert all(map(torch.equal, got, want))
    poisoned.assert_guards_intact()


def test_results_are_not_the_arguments() -> None:
    x, indices = on_device(features(1, 9, 3), kept_of(1, 9, 4))
    for rounds in (0, 1):
        assert kernels.coverage(x, indices, rounds)[0].data_ptr() != indices.data_ptr()


def test_nan_reaches_the_error_and_its_image_alone() -> None:
    x, indices = on_device(features(3, 20, 5), kept_of(3, 20, 4))
    want = coverage_error(x, indices, backend="triton")
    x[1, 7, 2] = torch.nan
    got = coverage_error(x, indices, backend="triton")
    assert got[1].isnan()
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    refined = refine(x, indices, 2, backend="triton")
    assert ((refined >= 0) & (refined < 20)).all()


def test_kept_twice_or_out_of_range_reads_nothing_foreign() -> None:
    """Not allowed, but no reason to read memory that is not ours."""
    x = surrounded(features(1, 12, 5).to(DEVICE))
    for bad in ([3, 3, 5], [3, 5, 99], [-1, 3, 5]):
        indices, error = kernels.coverage(x, torch.tensor([bad], device=DEVICE), 1)
        assert error.isfinite().all() or 99 in bad or -1 in bad
        assert indices.shape == (1, 3)


def test_nearest_is_nearest() -> None:
    x, indices = on_device(features(2, 50, 7), kept_of(2, 50, 9))
    image = _nearest.centred(x)
    kept = kernels._assign(image, indices)
    want = cover(centred(x.double()), indices)
    assert torch.equal(kept.owner.long(), want.owner)
    assert torch.allclose(kept.distance.double(), want.distance, rtol=1e-5, atol=1e-6)


@interpreter_only
def test_float64_needs_pytorch() -> None:
    x, indices = features(1, 9, 3).double(), kept_of(1, 9, 2)
    with pytest.raises(BackendUnavailableError, match=r"float32, float16 and bfloat16, not torch.float64"):
        refine(x, indices, 1, backend="triton")
