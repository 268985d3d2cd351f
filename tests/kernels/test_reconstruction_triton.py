"""The reconstruction kernels against the reference in float64, and bit by bit against themselves."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import recording
from ocvtp_kernels._tiles import table
from ocvtp_kernels.reconstruction import area_weighted_mse, reference
from ocvtp_kernels.reconstruction import triton as kernels
from tests.conftest import Golden, relative_error
from tests.kernels.triton_device import (
    DEVICE,
    IN_ANOTHER_ORDER,
    ON_GPU,
    PoisonedTorch,
    far_apart,
    interpreter_only,
    needs_gpu,
    randn,
    rounded,
    surrounded,
    within,
)

#: Both backends round; this is how far from zero their errors may be before they are compared.
FLOOR = 2.0**-22
#: Limits to what one program weighs: an image always, or never.
PATHS = {"whole": 2**62, "tiles": 0}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = itertools.product(DTYPES, repeat=2)
EMPTY = ("exclude", "official")

# NumPy's, while it interprets what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide).*:RuntimeWarning")


class Problem(NamedTuple):
    """``[B, N, C]`` twice and ``[B, K, N]``."""

    reconstruction: torch.Tensor
    features: torch.Tensor
    slot_attention: torch.Tensor


class Results(NamedTuple):
    """Losses ``[B]`` and gradients of a random weighting of them, ``[B, N, C]`` twice."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    features: torch.Tensor


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every size takes either way."""
    monkeypatch.setattr(kernels, "_WHOLE_LIMIT", PATHS[request.param])
    return request.param


def problem(
    batch: int,
    slots: int,
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 3.0,
    seed: int = 0,
) -> Problem:
    y, x = (randn(batch, tokens, width, seed=seed + i, dtype=dtype) for i in range(2))
    attention = (sharpness * randn(batch, slots, tokens, seed=seed + 2)).softmax(dim=1)
    return Problem(y, x, attention.to(dtype))


def results(p: Problem, backend: str, **options: Any) -> Results:
    y, x = (t.detach().requires_grad_() for t in p[:2])
    loss = area_weighted_mse(y, x, p.slot_attention, reduction="none", backend=backend, **options)
    weights = 0.5 + torch.arange(len(loss), dtype=loss.dtype, device=loss.device)
    return Results(loss.detach(), *torch.autograd.grad(loss, (y, x), weights))


def exact(p: Problem, **options: Any) -> Results:
    return results(Problem(*(t.double() for t in p)), "torch", **options)


def assert_accurate(p: Problem, **options: Any) -> Results:
    """At most twice the error of the reference in the same precision; returns the results."""
    want = exact(p, **options)
    allowed = results(p, "torch", **options)
    got = results(p, "triton", **options)
    assert got.loss.dtype == torch.float32
    for name, like, ours in zip(Results._fields, (got.loss, *p[:2]), got, strict=True):
        error, reference_error = (
            relative_error(getattr(r, name), getattr(want, name)) for r in (got, allowed)
        )
        assert ours.dtype == like.dtype
        assert ours.shape == like.shape
        assert ours.is_contiguous()
        assert reference_error <= max(2e-6, torch.finfo(like.dtype).eps)
        cut_off = torch.finfo(like.dtype).eps if like.dtype == torch.bfloat16 and not ON_GPU else 0.0
        assert error <= within(reference_error, FLOOR) + cut_off, name
    return got


def assert_same(got: Results, want: Results) -> None:
    """Bit for bit; a GPU may add in another order where the same values lie otherwise in memory."""
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs) or (ON_GPU and relative_error(ours, theirs) <= IN_ANOTHER_ORDER)


# ---------------------------------------------------------------------------------------------- accuracy


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(
    ("batch", "slots", "tokens", "width"),
    [(1, 1, 1, 1), (2, 5, 20, 7), (5, 3, 33, 40), (1, 65, 145, 72), (2, 64, 64, 256), (1, 17, 130, 257)],
)
def test_odd_shapes(batch: int, slots: int, tokens: int, width: int, empty: str) -> None:
    assert_accurate(problem(batch, slots, tokens, width), empty_slots=empty)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("empty", EMPTY)
def test_half_inputs(empty: str, dtype: torch.dtype) -> None:
    assert_accurate(problem(3, 9, 70, 48, dtype), empty_slots=empty)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(("slots", "tokens"), [(1030, 3), (2, 1100), (300, 300)])
def test_more_than_a_tile_counts(slots: int, tokens: int, empty: str) -> None:
    """Slots beyond one histogram, owners beyond one load of them, programs beyond one load of their sums."""
    assert_accurate(problem(1, slots, tokens, 8), empty_slots=empty)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(("batch", "slots", "tokens"), [(12, 64, 576), (3, 65, 577), (2, 640, 2880)])
def test_sizes_of_training(batch: int, slots: int, tokens: int, empty: str, dtype: torch.dtype) -> None:
    assert_accurate(problem(batch, slots, tokens, 1024, dtype), empty_slots=empty)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(
    ("power", "cap"), [(0.0, 10.0), (1.0, 1.2), (0.5, 0.3), (1.7, float("inf")), (-0.5, 2.0)]
)
def test_power_and_cap(power: float, cap: float, empty: str) -> None:
    p = problem(2, 12, 40, 8)
    got = assert_accurate(p, empty_slots=empty, power=power, cap=cap)
    assert power == 0.0 or relative_error(got.loss, results(p, "triton", empty_slots=empty).loss) > 1e-4


def owned(owners: list[int], slots: int, strength: float = 0.7) -> torch.Tensor:
    """``[1, K, N]`` where token n is ``owners[n]``'s, and the other slots share the rest."""
    attention = torch.full((1, slots, len(owners)), (1 - strength) / max(slots - 1, 1))
    attention[0, owners, range(len(owners))] = strength
    return attention.to(DEVICE)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(
    ("slots", "owners"),
    [
        (1, [0] * 20),
        (7, [0] * 20),
        (7, [6] * 20),
        (20, list(range(20))),
        (130, [129, 0, 64, 63, 129] * 7),
        (9, [1, 1, 1, 8]),
    ],
    ids=["one slot", "the first owns all", "the last owns all", "one token each", "tile edges", "most empty"],
)
def test_who_owns_what(slots: int, owners: list[int], empty: str) -> None:
    y, x, _ = problem(1, 1, len(owners), 6)
    assert_accurate(Problem(y, x, owned(owners, slots)), empty_slots=empty)


TIES = {
    "equal": [0.25],
    "two levels": [0.1, 0.3],
    "signed zeros": [-0.0, 0.0, 0.5],
    "subnormal": [0.0, 1e-45, 1e-40],
    "below zero": [-2.0, -1.0],
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("slots", [5, 140])
@pytest.mark.parametrize("levels", TIES)
def test_of_slots_that_attend_alike_the_lowest_owns(levels: str, slots: int) -> None:
    """Within a tile of slots and across tiles."""
    tokens = 60
    generator = torch.Generator().manual_seed(slots)
    values = torch.tensor(TIES[levels])
    attention = values[torch.randint(len(values), (1, slots, tokens), generator=generator)].to(DEVICE)
    if slots > 64:
        attention[:, :70, ::2] = (
            values.min()
        )  # the first of the best is in the second tile, or there are none
    lowest = [max(range(slots), key=lambda k: (column[k], -k)) for column in attention[0].T.tolist()]
    assert owners_of(attention).tolist() == [lowest]
    assert attention.argmax(dim=1).tolist() == [lowest]  # as the reference has it
    y, x, _ = problem(1, 1, tokens, 3)
    if float(values.min()) >= 0 and float(values.max()) > 1e-6:
        assert_accurate(Problem(y, x, attention))


def owners_of(attention: torch.Tensor) -> torch.Tensor:
    """``[B, N]``, as the first kernel leaves them."""
    batch, _, tokens = attention.shape
    rows = torch.zeros(batch, tokens, 1, device=DEVICE)
    found = PoisonedTorch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "torch", found)
        kernels.area_weighted_mse(rows, rows, attention, True, 0.5, 10.0)
    edge = (len(found.buffers[0]) - batch * tokens) // 2
    return found.buffers[0][edge:-edge].view(batch, tokens)


@pytest.mark.usefixtures("path")
def test_a_map_that_weighs_next_to_nothing() -> None:
    """The floor of the total weight: reached, and not."""
    y, x, attention = problem(3, 6, 30, 8)
    attention[0] = 0.0
    attention[1] *= 1e-12
    got = assert_accurate(Problem(y, x, attention))
    assert float(got.loss[0]) == 0.0
    assert float(got.reconstruction[0].abs().max()) == 0.0
    assert 0 < float(got.loss[1]) < 1e-2 * float(got.loss[2])


@pytest.mark.usefixtures("path")
def test_official_tensors(golden: Golden) -> None:
    recon, x, attention = (golden.tensors[name].to(DEVICE) for name in ("recon", "x", "attn"))
    recon = recon.clone().requires_grad_()
    options = {"empty_slots": "official", "backend": "triton"}
    per_image = area_weighted_mse(recon, x, attention, reduction="none", **options)
    loss = area_weighted_mse(recon, x, attention, **options)
    loss.backward()
    assert relative_error(per_image.cpu(), golden.tensors["loss_per_image"]) <= 1e-6
    assert relative_error(loss.cpu(), golden.tensors["loss"].squeeze()) <= 1e-6
    assert relative_error(recon.grad.cpu(), golden.tensors["grad_recon"]) <= 1e-6


# ------------------------------------------------------------------------------------- what is not finite


#: Where -> (which tensor, index into its second image).
NANS: dict[str, tuple[int, Any]] = {
    "reconstruction": (0, (4, 0)),
    "features": (1, (19, 8)),
    "all channels": (1, 3),
    "attention": (2, (2, 0)),
    "every slot's": (2, (slice(None), 19)),
    "a slot without tokens": (2, (5, 7)),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("where", NANS)
def test_nan_is_never_hidden(where: str, empty: str) -> None:
    """It spoils its own image and none other."""
    p = problem(3, 6, 20, 9)
    p.slot_attention[:, 5] = 0.0
    want = results(p, "triton", empty_slots=empty)
    which, index = NANS[where]
    p[which][1][index] = torch.nan
    got = results(p, "triton", empty_slots=empty)
    for ours, theirs in zip(got, want, strict=True):
        assert ours[1].isnan().any()
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("index", range(3))
def test_infinity_is_never_hidden(index: int, value: float) -> None:
    p = problem(2, 6, 20, 9)
    p[index][1, 3, 3] = value
    got, want = (results(p, backend).loss for backend in ("triton", "torch"))
    assert not got[1].isfinite()
    assert not want[1].isfinite()
    assert torch.equal(got[0], results(problem(2, 6, 20, 9), "triton").loss[0])


@pytest.mark.usefixtures("path")
def test_powers_beyond_float32_are_not_hidden() -> None:
    """Weights overflow, and infinity over infinity is no loss."""
    p = problem(1, 8, 100, 3, sharpness=9.0)
    for backend in ("triton", "torch"):
        assert area_weighted_mse(*p, empty_slots="official", power=300.0, backend=backend).isnan()


# ---------------------------------------------------------------------------------------- types and strides


@pytest.mark.parametrize("dtypes", [(*pair, DTYPES[i % 3]) for i, pair in enumerate(PAIRS)], ids=str)
def test_each_tensor_has_its_own_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    """Loads widen exactly, sums are in float32, and gradients are rounded once."""
    p = Problem(*(t.to(dtype) for t, dtype in zip(problem(2, 5, 20, 7), dtypes, strict=True)))
    want = results(Problem(*(t.float() for t in p)), "triton")
    got = results(p, "triton")
    assert_same(
        got,
        Results(want.loss, rounded(want.reconstruction, dtypes[0]), rounded(want.features, dtypes[1])),
    )


LAYOUTS = {
    "token-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every third": lambda t: torch.stack((t, torch.full_like(t, torch.nan), -t), dim=-1)[..., 0],
    "among others": lambda t: torch.stack((-t, t), dim=1)[:, 1],
    "surrounded by NaN": surrounded,
    "surrounded by much": lambda t: surrounded(t, 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    for sizes in ((2, 7, 33, 9), (2, 16, 48, 32)):
        p = problem(*sizes)
        views = Problem(*(LAYOUTS[layout](t) for t in p))
        assert all(t.stride() != v.stride() for t, v in zip(p, views, strict=True))
        assert_same(results(views, "triton"), results(p, "triton"))


@pytest.mark.usefixtures("path")
def test_shared_inputs() -> None:
    """Expanded views; one tensor twice."""
    p = problem(3, 4, 20, 6)
    shared = Problem(
        p.reconstruction, p.features[:1].expand(3, -1, -1), p.slot_attention[:, :1].expand(-1, 4, -1)
    )
    assert_same(results(shared, "triton"), results(Problem(*(t.contiguous() for t in shared)), "triton"))
    leaf = p.features.clone().requires_grad_()
    loss = area_weighted_mse(leaf, leaf, p.slot_attention, backend="triton")
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert float(loss.detach()) == 0.0
    assert float(gradient.abs().max()) == 0.0


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("far", range(3))
def test_beyond_32_bit_offsets(far: int, axis: int) -> None:
    shape = [2, 2, 2]
    shape[axis] = 5
    if far < 2:
        batch, tokens, width, slots = *shape, 3
    else:
        batch, slots, tokens, width = *shape, 3
    p = problem(batch, slots, tokens, width, torch.float16)
    views = [far_apart(t, axis) if i == far else t for i, t in enumerate(p)]
    assert_same(results(Problem(*views), "triton"), results(p, "triton"))


def test_what_a_dimension_of_one_says_does_not_matter() -> None:
    """A tensor of one image may claim any stride; compiled code, and with it bits, would depend on it."""
    p = problem(1, 4, 16, 16)
    odd = Problem(*(t.as_strided(t.shape, (7, *t.stride()[1:])) for t in p))
    recorded = []
    for each in (p, odd):
        with recording() as launches:
            results(each, "triton")
        recorded.append(
            [[a for a in launch.arguments if not isinstance(a, torch.Tensor)] for launch in launches]
        )
    assert len(recorded[0]) == 3
    assert recorded[0] == recorded[1]


# --------------------------------------------------------------------------------------------- gradients


def test_gradients_of_some_inputs() -> None:
    p = problem(2, 5, 20, 7, torch.float16)
    want = results(p, "triton")
    for wanted in (0, 1):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(p)]
        loss = area_weighted_mse(*leaves, reduction="none", backend="triton")
        (gradient,) = torch.autograd.grad(loss, leaves[wanted], torch.tensor([0.5, 1.5], device=DEVICE))
        assert torch.equal(gradient, want[1 + wanted])


@pytest.mark.parametrize(("y", "x"), [(True, False), (False, True), (True, True)])
def test_what_is_not_wanted_is_not_written(y: bool, x: bool) -> None:
    p = problem(2, 5, 20, 7)
    weights, total = randn(2, 20, seed=3), randn(2, seed=4)
    grads = kernels.area_weighted_mse_backward(total, *p[:2], weights, total, y, x)
    assert [g.numel() for g in grads] == [280 * y, 280 * x]


def test_the_map_has_no_gradient() -> None:
    p = problem(2, 5, 20, 7)
    attention = p.slot_attention.requires_grad_()
    assert not area_weighted_mse(*p[:2], attention, backend="triton").requires_grad
    y = p.reconstruction.clone().requires_grad_()
    area_weighted_mse(y, p.features, attention, backend="triton").backward()
    assert y.grad is not None
    assert attention.grad is None


def test_incoming_gradients_of_any_stride() -> None:
    """Expanded, as a mean leaves them; a column; in another order."""
    p = problem(3, 5, 20, 7)
    y = p.reconstruction.requires_grad_()

    def gradient(incoming: torch.Tensor) -> torch.Tensor:
        loss = area_weighted_mse(*p, reduction="none", backend="triton")
        return torch.autograd.grad(loss, y, incoming)[0]

    third = torch.tensor([1 / 3], device=DEVICE)
    want = gradient(third.repeat(3))
    assert torch.equal(gradient(third.expand(3)), want)
    mean = area_weighted_mse(*p, backend="triton")
    assert torch.equal(torch.autograd.grad(mean, y)[0], want)
    column = randn(3, 4, seed=0)[:, 1]
    assert torch.equal(gradient(column), gradient(column.contiguous()))
    (scaled,) = torch.autograd.grad(256.0 * area_weighted_mse(*p, backend="triton"), y)
    assert torch.equal(scaled, 256.0 * want)  # as a loss scaler does


def test_what_is_kept_for_the_backward_pass() -> None:
    """The two inputs themselves, and a number for each token and image; without a gradient nothing."""
    p = problem(2, 5, 20, 64, torch.float16)
    y = p.reconstruction.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        area_weighted_mse(*p, reduction="none", backend="triton")
        assert [t.data_ptr() for t in kept[:2]] == [t.data_ptr() for t in p[:2]]
        assert [(tuple(t.shape), t.dtype) for t in kept[2:]] == [
            ((2, 20), torch.float32),
            ((2,), torch.float32),
        ]
        kept.clear()
        with torch.no_grad():
            assert not area_weighted_mse(*p, backend="triton").requires_grad
        assert not area_weighted_mse(y.detach(), *p[1:], backend="triton").requires_grad
    assert kept == []


def test_a_changed_input_is_noticed() -> None:
    p = problem(1, 3, 9, 4)
    p.reconstruction.requires_grad_()
    loss = area_weighted_mse(*p, backend="triton")
    p.features.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative() -> None:
    p = problem(2, 4, 9, 5)
    found = []
    for backend in ("torch", "triton"):
        y, x = (t.clone().requires_grad_() for t in p[:2])
        loss = area_weighted_mse(y, x, p.slot_attention, backend=backend).square()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = torch.autograd.grad(loss, (y, x), create_graph=True)
            found.append(torch.autograd.grad(first[0].square().sum() + first[1].pow(3).sum(), (y, x)))
    for ours, theirs in zip(*reversed(found), strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_backward_formula() -> None:
    """In float64, which the kernels don't take."""

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            attention = p.slot_attention
            slots = reference.slot_weights(attention, True, 0.5, 10.0)
            weights = (attention * slots[:, :, None]).sum(dim=1)
            ctx.save_for_backward(y, x, weights, weights.sum(dim=1))
            return reference.area_weighted_mse(y, x, attention, True, 0.5, 10.0)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return reference.area_weighted_mse_backward(grad, *ctx.saved_tensors)

    p = Problem(*(t.double() for t in problem(2, 3, 5, 4)))
    leaves = tuple(t.requires_grad_() for t in p[:2])
    assert torch.autograd.gradcheck(Formula.apply, leaves)
    assert torch.autograd.gradgradcheck(Formula.apply, leaves)


# ---------------------------------------------------------------------------------- one result, many ways


def test_launches() -> None:
    """Two up to the limit, else three; one more backward, even for both gradients."""

    def names(p: Problem) -> list[str]:
        with recording() as launches:
            results(p, "triton")
        return [launch.kernel.fn.__name__ for launch in launches]

    assert kernels._WHOLE_LIMIT == 64 * 1024
    small, large = problem(2, 64, 1024, 1), problem(2, 64, 1025, 1)
    assert names(small) == ["token_errors", "token_weights", "gradients"]
    assert names(large) == ["token_errors", "token_weights", "total_loss", "gradients"]


@pytest.mark.parametrize("empty", EMPTY)
def test_paths_agree(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(2, 65, 145, 12)
    found = []
    for limit in PATHS.values():
        monkeypatch.setattr(kernels, "_WHOLE_LIMIT", limit)
        found.append(results(p, "triton", empty_slots=empty))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) <= (IN_ANOTHER_ORDER if ON_GPU else 2e-7)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batch_and_run_do_not_matter(dtype: torch.dtype) -> None:
    p = problem(5, 9, 66, 17, dtype)
    together = results(p, "triton")
    scales = 0.5 + torch.arange(5, device=DEVICE)
    for images in ([0, 1, 2, 3, 4], [3, 0], [4]):
        y, x = (t[images].requires_grad_() for t in p[:2])
        loss = area_weighted_mse(y, x, p.slot_attention[images], reduction="none", backend="triton")
        gradients = torch.autograd.grad(loss, (y, x), scales[images])
        assert torch.equal(loss, together.loss[images])
        assert torch.equal(gradients[0], together.reconstruction[images])
        assert torch.equal(gradients[1], together.features[images])
        view = [t[images[0] : images[0] + 1] for t in p]  # the same memory, an image further
        assert torch.equal(
            area_weighted_mse(*view, reduction="none", backend="triton"), together.loss[images[:1]]
        )


def test_autocast_does_not_matter() -> None:
    p = problem(2, 5, 30, 8)
    want = results(p, "triton")
    want_torch = results(p, "torch")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        for ours, theirs in zip(results(p, "triton"), want, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(results(p, "torch"), want_torch, strict=True):
            assert torch.equal(ours, theirs)
        mean = area_weighted_mse(*p, backend="triton")
    assert mean.dtype == torch.float32


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("pad", [1, 8])
def test_every_output_is_written_and_nothing_else(
    path: str, pad: int, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From poisoned memory, between guards, with NaN on all sides of every input."""
    p = problem(2, 9, 75, 21, torch.float16)
    want = results(p, "triton", empty_slots=empty)
    torch_with_guards = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", torch_with_guards)
    among = Problem(*(surrounded(t, pad) for t in p))
    assert_same(results(among, "triton", empty_slots=empty), want)
    torch_with_guards.assert_guards_intact()
    assert len(torch_with_guards.buffers) == (8 if path == "whole" else 10)


def _tile_sets() -> list[Any]:
    """An architecture for each distinct set of tiles, warps and stages aside."""
    distinct: dict[str, Any] = {}
    for arch in sorted({arch for _, arch, _ in table()}):
        rows = [
            (kernel, shape, {name: value for name, value in tile.items() if not name.startswith("num_")})
            for (kernel, owner, shape), tile in table().items()
            if owner == arch and kernel.startswith("reconstruction.")
        ]
        assert len(rows) == 5
        distinct.setdefault(str(rows), arch)
    return list(distinct.values())


@interpreter_only
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("arch", _tile_sets())
def test_tiles_of_all_architectures(arch: str) -> None:
    with pretend(arch):
        assert_accurate(problem(2, 70, 140, 300, torch.float16))
