"""The received-attention kernels against the whole map in float64, and bit by bit against themselves."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels._arch import pretend
from ocvtp_kernels._tiles import Tile, table
from ocvtp_kernels._tiles import tile as table_row
from ocvtp_kernels.received_attention import received_attention, reference
from ocvtp_kernels.received_attention import triton as kernels
from tests.conftest import relative_error
from tests.kernels.triton_device import (
    DEVICE,
    IN_ANOTHER_ORDER,
    NEEDS_GPU,
    ON_GPU,
    PoisonedTorch,
    far_apart,
    interpreter_only,
    needs_gpu,
    randn,
    surrounded,
    within,
)

#: Both backends round; this is how far from zero their errors may be before they are compared.
FLOOR = 2.0**-22
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=NEEDS_GPU),  # the interpreter can't multiply it
]
Inputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles in the interpreter, whose time goes by the number of tiles."""

    def tile(kernel: str, arch: str, shape: str) -> Tile:
        row = table_row(kernel, arch, shape)
        return {**row, "BM": 512, "BN": 512} if "BM" in row else row

    if not ON_GPU:
        monkeypatch.setattr(kernels, "tile", tile)


def inputs(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    q = randn(batch, heads, queries, width, seed=seed, dtype=dtype)
    return q, randn(batch, heads, keys, width, seed=seed + 1, dtype=dtype)


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float | None = None,
    lse: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, with the whole map, in float64."""
    logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    lengths: Any = q.shape[2]
    if cu_seqlens is not None:
        sizes = cu_seqlens.diff()
        segment = torch.arange(len(sizes), device=q.device).repeat_interleave(sizes)
        logits = logits.masked_fill(segment[:, None] != segment, -torch.inf)
        lengths = sizes[segment]
    attention = logits.softmax(dim=-1) if lse is None else (logits - lse.double()[..., None]).exp()
    return attention.sum(dim=(1, 2)) / (q.shape[1] * lengths)


def log_sum_exp(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Natural logarithm, as FlashAttention returns it."""
    return (q.double() @ k.double().mT * q.shape[-1] ** -0.5).logsumexp(dim=-1).float()


def assert_accurate(
    q: torch.Tensor, k: torch.Tensor, scale: float | None = None, **options: torch.Tensor
) -> torch.Tensor:
    """At most twice the error of the reference in the same precision; returns the result."""
    want = oracle(q, k, scale, **options)
    reference_error = relative_error(received_attention(q, k, scale, backend="torch", **options), want)
    assert reference_error <= 1e-6
    received = received_attention(q, k, scale, backend="triton", **options)
    assert received.dtype == torch.float32
    assert received.shape == (k.shape[0], k.shape[2])
    assert relative_error(received, want) <= within(reference_error, FLOOR)
    return received


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The UNITs that kernels ran with: 8 promises rows of whole 16 bytes, 1 nothing; 0 is the head mean's."""
    seen: set[int] = set()
    launch = kernels.launch

    def spy(*arguments: Any, **tile: Any) -> None:
        seen.add(tile.get("UNIT", 0))
        launch(*arguments, **tile)

    monkeypatch.setattr(kernels, "launch", spy)
    return seen


# ---------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 64, 72, 80, 96, 97, 128])
def test_head_dims(width: int, dtype: torch.dtype) -> None:
    assert_accurate(*inputs(1, 1, 144, 144, width, dtype))


def assert_sums_to_one(received: torch.Tensor) -> None:
    sums = received.sum(dim=1)
    assert torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width"), [(3, 2, 1, 64), (3, 1, 49, 72), (1, 17, 9, 16)]
)
def test_small_images(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    """More heads than are averaged at a time, too."""
    assert_sums_to_one(assert_accurate(*inputs(batch, heads, tokens, tokens, width, dtype)))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width"),
    [(1, 1, 576, 64), (3, 1, 577, 64), (1, 2, 577, 80), (1, 1, 2880, 64)],
)
def test_large_images(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    assert_sums_to_one(assert_accurate(*inputs(batch, heads, tokens, tokens, width, dtype)))


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 49), (49, 1), (144, 49), (64, 130), (129, 128), (17, 200), (65, 33)]
)
def test_queries_and_keys_of_different_number(queries: int, keys: int) -> None:
    assert_accurate(*inputs(2, 2, queries, keys, 64, torch.float16))
    assert_accurate(*inputs(1, 1, queries, keys, 80), scale=0.2)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("sharpness", [0.01, 4.0, 16.0, 64.0])
def test_sharp_attention(sharpness: float) -> None:
    """Logits are rounded in both passes, each time by up to 2**-24 of them, which the reference sees once
    and divides out where a query attends to one key; so what may be added here grows with the logits."""
    q, k = inputs(1, 2, 300, 300, 64)
    k[:, :, 0] *= 4  # a sink
    scale = sharpness * 64**-0.5
    want = oracle(q, k, scale)
    error, reference_error = (
        relative_error(received_attention(q, k, scale, backend=backend), want)
        for backend in ("triton", "torch")
    )
    assert error <= within(reference_error, FLOOR * max(1.0, sharpness))


# ----------------------------------------------------------------------------------------------- strides


def fused(q: torch.Tensor, k: torch.Tensor) -> Inputs:
    """Views of what one projection made, ``[B, N, 3, H, d]``."""
    qkv = torch.stack((q, k, torch.full_like(k, torch.nan)), dim=0)  # [3, B, H, N, d]
    qkv = qkv.permute(1, 3, 0, 2, 4).contiguous()
    return qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)


def tokens_first(t: torch.Tensor) -> torch.Tensor:
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


VIEWS: dict[str, tuple[int, Callable[[torch.Tensor, torch.Tensor], Inputs]]] = {
    "fused projection": (8, fused),
    "channels first": (1, lambda q, k: (q.mT.contiguous().mT, k.mT.contiguous().mT)),  # 49 * 1 is odd
    "odd rows": (1, lambda q, k: (surrounded(q), surrounded(k))),
    "rows of 16 bytes among poison": (8, lambda q, k: (surrounded(q, 8), surrounded(k, 8))),
    "one odd": (1, lambda q, k: (q, surrounded(k))),
    "tokens first": (8, lambda q, k: (tokens_first(q), tokens_first(k))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("width", [64, 72])
def test_strides_do_not_matter(view: str, width: int, dtype: torch.dtype, units: set[int]) -> None:
    q, k = inputs(2, 2, 49, 49, width, dtype)
    want = received_attention(q, k, backend="triton")
    assert units == {0, 8}
    units.clear()
    unit, make = VIEWS[view]
    assert torch.equal(received_attention(*make(q, k), backend="triton"), want)
    assert units == {0, unit}


def test_views_that_choose() -> None:
    """Without the class token's query; with shared key heads; with every other token."""
    q, k = inputs(2, 4, 50, 50, 64, torch.float16)
    without = received_attention(q[:, :, 1:], k, backend="triton")
    assert torch.equal(without, received_attention(q[:, :, 1:].contiguous(), k, backend="triton"))
    assert relative_error(without, oracle(q[:, :, 1:], k)) <= 5e-7
    shared = k[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(
        received_attention(q, shared, backend="triton"),
        received_attention(q, shared.contiguous(), backend="triton"),
    )
    assert torch.equal(
        received_attention(q[:, :, ::2], k[:, :, 1::2], backend="triton"),
        received_attention(q[:, :, ::2].contiguous(), k[:, :, 1::2].contiguous(), backend="triton"),
    )


@pytest.mark.parametrize(("axis", "width"), [(0, 8), (1, 8), (2, 8), (0, 7), (1, 7), (2, 7), (3, 5)])
@pytest.mark.parametrize("far", ["q", "k"])
def test_beyond_32_bit_offsets(far: str, axis: int, width: int, units: set[int]) -> None:
    shape = [1, 1, 2, width]
    shape[axis] = 5
    q, k = randn(*shape, seed=0, dtype=torch.float16), randn(*shape, seed=1, dtype=torch.float16)
    want = received_attention(q, k, backend="triton")
    units.clear()
    views = (far_apart(q, axis), k) if far == "q" else (q, far_apart(k, axis))
    assert torch.equal(received_attention(*views, backend="triton"), want)
    assert units == {0, 8 if width == 8 else 1}


# ------------------------------------------------------------------------------------ given log-sum-exp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_log_sum_exp(dtype: torch.dtype) -> None:
    q, k = inputs(2, 2, 30, 130, 72, dtype)
    lse = log_sum_exp(q, k)
    want = assert_accurate(q, k, lse=lse)
    assert relative_error(want, oracle(q, k)) <= 1e-6
    # Its strides and wider types don't matter; nor do keys that are left out.
    for same in (lse.double(), lse.mT.contiguous().mT, surrounded(lse)):
        assert torch.equal(received_attention(q, k, lse=same, backend="triton"), want)
    some = received_attention(q, k[:, :, 5:77:3], lse=lse, backend="triton")
    assert relative_error(some, want[:, 5:77:3]) <= (IN_ANOTHER_ORDER if ON_GPU else 1e-7)
    half = lse.half()
    assert torch.equal(
        received_attention(q, k, lse=half, backend="triton"),
        received_attention(q, k, lse=half.float(), backend="triton"),
    )


def test_log_sum_exp_spares_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs(1, 2, 20, 20, 16)
    launched: list[str] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    received_attention(q, k, backend="triton")
    assert launched == ["row_lse", "column_mean", "head_mean"]
    launched.clear()
    received_attention(q, k, lse=log_sum_exp(q, k), backend="triton")
    assert launched == ["column_mean", "head_mean"]


def test_queries_that_attend_to_nothing_count_nothing() -> None:
    """An infinite log-sum-exp, as attention kernels return for masked rows."""
    q, k = inputs(1, 2, 20, 30, 16)
    lse = log_sum_exp(q, k)
    lse[:, :, 7] = torch.inf
    assert_accurate(q, k, lse=lse)


# --------------------------------------------------------------------------------------- packed segments

PACKED = {
    "one": [0, 60],
    "two": [0, 1, 60],
    "empty at the ends": [0, 0, 0, 33, 60, 60],
    "empty in the middle": [0, 20, 20, 20, 21, 60],
    "one token each": list(range(9)),
    "longer than a tile": [0, 3, 150, 160, 290],
    "all lanes": [*[0] * 30, *range(34), 40],
    "more than 64": [*[0] * 30, *range(30), *[29] * 5, 40],  # by one
}


def bounds_of(name: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(PACKED[name], dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("with_lse", [False, True])
def test_packed_segments_equal_each_alone(name: str, with_lse: bool) -> None:
    bounds = bounds_of(name)
    tokens = int(bounds[-1])
    heads, dtype = (2, torch.float16) if len(bounds) < 9 else (1, torch.float32)
    q, k = inputs(1, heads, tokens, tokens, 72, dtype)
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds.tolist()) if a < b]
    lse = torch.cat([log_sum_exp(q[:, :, p], k[:, :, p]) for p in pieces], dim=2) if with_lse else None
    options = {"cu_seqlens": bounds} | ({"lse": lse} if lse is not None else {})
    packed = assert_accurate(q, k, **options)
    for piece in pieces[:2] + pieces[-2:]:
        part = None if lse is None else lse[:, :, piece]
        alone = received_attention(q[:, :, piece], k[:, :, piece], lse=part, backend="triton")
        assert torch.equal(alone, packed[:, piece])
        assert abs(float(alone.sum()) - 1) <= 1e-6


def test_one_segment_is_no_segment() -> None:
    q, k = inputs(1, 2, 150, 150, 64)
    bounds = torch.tensor([0, 150], device=DEVICE)
    assert torch.equal(
        received_attention(q, k, cu_seqlens=bounds, backend="triton"),
        received_attention(q, k, backend="triton"),
    )


def test_bounds_of_any_type_and_stride() -> None:
    q, k = inputs(1, 1, 60, 60, 16)
    narrow = bounds_of("empty in the middle")
    want = received_attention(q, k, cu_seqlens=narrow, backend="triton")
    wide = narrow.long()
    for same in (wide, surrounded(narrow), torch.stack((wide, -wide), dim=1)[:, 0]):
        assert torch.equal(received_attention(q, k, cu_seqlens=same, backend="triton"), want)


def test_bounds_that_do_not_cover_the_tokens() -> None:
    q, k = inputs(1, 1, 60, 60, 16)
    for bad in ([0, 59], [1, 60], [0, 40, 30, 60], [0, 61]):
        if not ON_GPU:  # there it is an assertion on the device, which ends the process's CUDA context
            with pytest.raises(ValueError, match="ascend from 0"):
                received_attention(q, k, cu_seqlens=torch.tensor(bad), backend="triton")
    for bad in ([0], [[0, 60]], [0.0, 60.0]):
        with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
            received_attention(q, k, cu_seqlens=torch.tensor(bad, device=DEVICE), backend="triton")


@needs_gpu
def test_the_most_segments() -> None:
    bounds = torch.arange(4097, device=DEVICE) * 2
    q, k = inputs(1, 2, 8192, 8192, 64, torch.float16)
    got = received_attention(q, k, cu_seqlens=bounds, backend="triton")
    pairs = [t.unflatten(2, (4096, 2)).movedim(2, 0)[:, 0] for t in (q, k)]
    assert torch.equal(got, received_attention(*pairs, backend="triton").reshape(1, -1))


# --------------------------------------------------------------------------------------------- gradients


def gradients(
    function: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, **options: torch.Tensor | None
) -> list[torch.Tensor]:
    """Of a random weighting of the result, with respect to everything differentiable."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in (("q", q), ("k", k))}
    lse = options.pop("lse", None)
    if lse is not None:
        leaves["lse"] = lse.detach().clone().requires_grad_()
    received = function(**leaves, **options)
    weights = randn(*received.shape, seed=9).to(received.dtype)
    return list(torch.autograd.grad((received * weights).sum(), tuple(leaves.values())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients(with_lse: bool, packed: bool, dtype: torch.dtype) -> None:
    """Through more than one block of the backward pass, against autograd through the whole map in float64."""
    q, k = inputs(1 if packed else 2, 1 + packed, 150, 150, 16, dtype)
    bounds = torch.tensor([0, 0, 40, 41, 150], device=DEVICE) if packed else None
    lse = log_sum_exp(q, k) if with_lse else None
    options = {"lse": lse, "cu_seqlens": bounds}
    want = gradients(oracle, q.double(), k.double(), **options)
    allowed = gradients(lambda **o: received_attention(**o, backend="torch"), q, k, **options)
    got = gradients(lambda **o: received_attention(**o, backend="triton"), q, k, **options)
    assert len(got) == len(want) == 2 + with_lse
    for ours, theirs, exact, like in zip(got, allowed, want, (q, k, lse), strict=False):
        assert ours.dtype == like.dtype
        assert relative_error(theirs, exact) <= 16 * torch.finfo(like.dtype).eps
        assert relative_error(ours, exact) <= within(relative_error(theirs, exact), FLOOR)


def test_gradients_of_queries_and_keys_of_different_number() -> None:
    q, k = inputs(2, 2, 130, 20, 72)
    q, k = surrounded(q), k[:, :1].expand(-1, 2, -1, -1)  # strided, and a key head shared
    want = gradients(oracle, q.double(), k.double())
    got = gradients(lambda **o: received_attention(**o, backend="triton"), q, k)
    apart = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
    assert apart <= (IN_ANOTHER_ORDER if ON_GPU else 1e-6)


def test_gradients_of_some_inputs() -> None:
    q, k = inputs(1, 2, 20, 30, 16)
    lse = log_sum_exp(q, k)
    weights = randn(1, 30, seed=5)
    full = [t.clone().requires_grad_() for t in (q, k, lse)]
    want = torch.autograd.grad(
        (received_attention(full[0], full[1], lse=full[2], backend="triton") * weights).sum(), full
    )
    for index, gradient in enumerate(want):
        some = [t.clone().requires_grad_(i == index) for i, t in enumerate((q, k, lse))]
        received = received_attention(some[0], some[1], lse=some[2], backend="triton")
        assert torch.equal(torch.autograd.grad((received * weights).sum(), some[index])[0], gradient)
    with torch.no_grad():
        assert not received_attention(full[0], full[1], backend="triton").requires_grad
    assert not received_attention(q, k, backend="triton").requires_grad


def test_second_derivative() -> None:
    q, k = inputs(1, 2, 9, 12, 16)
    weights = randn(1, 12, seed=3)
    results = []
    for backend in ("torch", "triton"):
        leaf = q.clone().requires_grad_()
        received = received_attention(leaf, k, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (first,) = torch.autograd.grad((received * weights).sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert relative_error(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_backward_formula(with_lse: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, which the kernels don't take, over several blocks and from poisoned memory."""
    monkeypatch.setattr(reference, "_BLOCK", 3)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor | None) -> torch.Tensor:
            ctx.save_for_backward(*tensors)
            q, k, lse, bounds = tensors
            return reference.received_attention(q, k, 0.7, lse, bounds)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            q, k, lse, bounds = ctx.saved_tensors
            return *reference.received_attention_backward(grad, q, k, 0.7, lse, bounds), None

    class Poisoned(PoisonedTorch):
        def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.full_like(tensor, torch.nan)

    monkeypatch.setattr(reference, "torch", Poisoned())
    queries = 5 if packed else 7
    q = randn(1, 2, queries, 3, seed=0, dtype=torch.float64).requires_grad_()
    k = randn(1, 2, 5, 3, seed=1, dtype=torch.float64).requires_grad_()
    lse = randn(1, 2, queries, seed=2, dtype=torch.float64).requires_grad_() if with_lse else None
    bounds = torch.tensor([0, 1, 1, 5], device=DEVICE) if packed else None
    assert torch.autograd.gradcheck(Formula.apply, (q, k, lse, bounds))


# ---------------------------------------------------------------------------------- one result, many ways


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_run_do_not_matter(dtype: torch.dtype) -> None:
    q, k = inputs(3, 2, 40, 90, 64, dtype)
    lse = log_sum_exp(q, k)
    together = received_attention(q, k, backend="triton")
    given = received_attention(q, k, lse=lse, backend="triton")
    for images in ([0, 1, 2], [2, 1, 0], [1]):
        part = received_attention(q[images], k[images], backend="triton")
        assert torch.equal(part, together[images])
        part = received_attention(q[images], k[images], lse=lse[images], backend="triton")
        assert torch.equal(part, given[images])


def test_autocast_does_not_matter() -> None:
    q, k = inputs(1, 2, 30, 30, 16)
    want = received_attention(q, k, backend="triton")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(received_attention(q, k, backend="triton"), want)


def test_autocast_around_the_backward_pass_does_not_matter() -> None:
    q, k = inputs(1, 2, 30, 30, 16)
    want = gradients(lambda **o: received_attention(**o, backend="triton"), q, k)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = gradients(lambda **o: received_attention(**o, backend="triton"), q, k)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("case", "pad"), [("plain", 1), ("plain", 8), ("lse", 8), ("segments", 8), ("many segments", 1)]
)
def test_every_output_is_written_and_nothing_else(
    case: str, pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = inputs(1, 1, 40, 40, 72) if "segments" in case else inputs(2, 2, 70, 70, 72, torch.float16)
    options = {
        "lse": {"lse": log_sum_exp(q, k)},
        "segments": {"cu_seqlens": torch.tensor([0, 3, 30, 40], device=DEVICE)},
        "many segments": {"cu_seqlens": bounds_of("more than 64")},
    }.get(case, {})
    want = received_attention(q, k, backend="triton", **options)
    torch_with_guards = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", torch_with_guards)
    # NaN where no token is: in the rows, channels and heads beside, and around the log-sum-exp.
    among = {name: surrounded(t) for name, t in options.items()}
    q, k = surrounded(q, pad), surrounded(k, pad)
    assert torch.equal(received_attention(q, k, backend="triton", **among), want)
    torch_with_guards.assert_guards_intact()
    assert len(torch_with_guards.buffers) == 3 - (case == "lse")


def _tile_sets() -> list[Any]:
    """An architecture for each distinct pair of tiles that a shape class has, warps and stages aside."""
    distinct: dict[tuple[str, str], Any] = {}
    for _, arch, shape in sorted(table()):
        if shape.startswith("d"):
            pair = (table()[f"received_attention.{name}", arch, shape] for name in ("row_lse", "column_mean"))
            cut = [(tile["BM"], tile["BN"]) for tile in pair]
            precision = " ieee" if arch.startswith("gfx") and "32bit" in shape else ""
            distinct.setdefault((shape, f"{cut}{precision}"), pytest.param(arch, shape, id=f"{arch}-{shape}"))
    return list(distinct.values())


@interpreter_only
@pytest.mark.parametrize(("arch", "shape"), _tile_sets())
def test_tiles_of_all_architectures(arch: str, shape: str) -> None:
    width, size = shape[1:].split("-")
    dtype = torch.float32 if size == "32bit" else torch.float16
    with pretend(arch):
        assert_accurate(*inputs(1, 1, 150, 140, int(width), dtype))
