"""What the operators are to PyTorch: schemas, fakes, compilation, FLOPs, graphs; and which backend runs."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from bench.launches import launches
from ocvtp_kernels import BackendUnavailableError, _arch, _backend, _library, _nearest, _tiles
from ocvtp_kernels._launch import recording
from ocvtp_kernels._tiles import table
from ocvtp_kernels.coverage import coverage_error, refine
from ocvtp_kernels.coverage import op as coverage_op
from ocvtp_kernels.coverage import triton as coverage_kernels
from ocvtp_kernels.diversity import farthest_points, largest_volume
from ocvtp_kernels.diversity import op as diversity_op
from ocvtp_kernels.diversity import triton as diversity_kernels
from ocvtp_kernels.merge import merge_by, merge_tokens, nearest_kept
from ocvtp_kernels.merge import op as merge_op
from ocvtp_kernels.merge import triton as merge_kernels
from ocvtp_kernels.received_attention import op as attention_op
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.received_attention import shapes as attention_shapes
from ocvtp_kernels.received_attention import triton as attention_kernels
from ocvtp_kernels.reconstruction import area_weighted_mse
from ocvtp_kernels.reconstruction import op as reconstruction_op
from ocvtp_kernels.reconstruction import triton as reconstruction_kernels
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.selection import op as selection_op
from ocvtp_kernels.selection import shapes as selection_shapes
from ocvtp_kernels.selection import triton as selection_kernels
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    SlotStart,
    slot_assignment,
    slot_attention,
    start_from_slots,
    top_tokens,
)
from ocvtp_kernels.slot_attention import cut as slot_cut
from ocvtp_kernels.slot_attention import loop as slot_loop
from ocvtp_kernels.slot_attention import op as slot_op
from ocvtp_kernels.slot_attention import shapes as slot_shapes
from ocvtp_kernels.slot_attention import triton as slot_kernels
from ocvtp_kernels.slot_attention.training import op as training_op
from ocvtp_kernels.slot_attention.training import triton as training_kernels
from tests.kernels.test_selection import keys_of
from tests.kernels.test_slot_attention_triton import ODD, TINY, Widths, half_of, official, problem
from tests.kernels.triton_device import DEVICE, ON_GPU, interpreter_only, needs_gpu, randn

Arguments = tuple[Any, ...]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(selection_kernels, "processors", lambda _: 1)


def indices(batch: int, keep: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + keep + tokens)
    return torch.randint(tokens, (batch, keep), generator=generator).to(DEVICE)


def distinct(batch: int, keep: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return randn(batch, tokens, seed=seed).argsort(dim=1)[:, :keep].sort(dim=1).values


def bounds(tokens: int, segments: int) -> torch.Tensor:
    return torch.linspace(0, tokens, segments + 1).long().to(DEVICE)


# ------------------------------------------------------------------------------------- schemas and fakes

MAP, FILL, X = randn(2, 3, 9, seed=0), randn(2, 9, seed=1), randn(2, 9, 5, seed=2)
Q, K = randn(2, 2, 9, 16, seed=3), randn(2, 2, 12, 16, seed=4)
Y, TOTAL = randn(2, 9, 5, seed=9), torch.tensor([2.0, 3.0], device=DEVICE)
KEYS = keys_of(MAP, 2)
SLOTS = problem(2, 3, 9, TINY)
FEATURES, START, WEIGHTS = SLOTS.arguments(torch.float32)
HALF_START, HALF_WEIGHTS = SLOTS.folded(torch.float16)
TRAINED = SlotAttentionWeights(*(t.float() for t in SLOTS.weights))
OPERATORS: dict[str, tuple[Any, Arguments]] = {
    "select_tokens": (selection_op._select_tokens, (MAP, 4, FILL)),
    "select_tokens without fill scores": (selection_op._select_tokens, (MAP.half(), 4, None)),
    "select_rows": (selection_op._select_rows, (MAP.mT.contiguous().mT, 4, None, X[:, :, ::2])),
    "select_from_keys": (selection_op._select_from_keys, (KEYS, 4, FILL.half())),
    "rows_from_keys": (selection_op._rows_from_keys, (KEYS.mT.contiguous().mT, 4, FILL, X[:, :, ::2])),
    "gather_tokens": (selection_op._gather_tokens, (X.half().mT, indices(2, 6, 5))),
    "scatter_tokens": (selection_op._scatter_tokens, (X, indices(2, 9, 7), 7)),
    "coverage": (coverage_op._coverage, (X.half().mT.contiguous().mT, distinct(2, 4, 9), 1)),
    "coverage, no round": (coverage_op._coverage, (X, distinct(2, 9, 9), 0)),
    "nearest_kept": (merge_op._nearest_kept, (X.half().mT.contiguous().mT, distinct(2, 4, 9), None, True)),
    "nearest_kept, not counted": (
        merge_op._nearest_kept,
        (X, distinct(2, 4, 9), distinct(2, 4, 9).mT.contiguous().mT < 7, False),
    ),
    "merge_by": (merge_op._merge_by, (X.half().mT.contiguous().mT, indices(2, 9, 4), 4)),
    "spread_rows": (merge_op._spread_rows, (X[:, :, ::2], indices(2, 7, 9), FILL.abs() + 1)),
    "farthest_points": (diversity_op._farthest_points, (X.half().mT.contiguous().mT, 4)),
    "largest_volume": (diversity_op._largest_volume, (X, 4)),
    "received_attention": (attention_op._received_attention, (Q, K, 0.25, None, None)),
    "received_attention packed": (
        attention_op._received_attention,
        (Q[:1].half(), K[:1, :, :9].half(), 0.25, Q[:1, :, :, 0], bounds(9, 2)),
    ),
    "received_attention_backward": (
        attention_op._received_attention_backward,
        (randn(2, 9, seed=5), Q.mT.contiguous().mT, K[:, :, 3:, :], 0.25, None, None),
    ),
    "received_attention_backward packed": (
        attention_op._received_attention_backward,
        (Q[:1, 0, :, 0], Q[:1].half(), K[:1, :, :9].half(), 0.25, Q[:1, :, :, 0], bounds(9, 2)),
    ),
    "area_weighted_mse": (
        reconstruction_op._area_weighted_mse,
        (Y.half(), X.mT.contiguous().mT, MAP.mT.contiguous().mT, True, 0.5, 10.0),
    ),
    "area_weighted_mse_backward": (
        reconstruction_op._area_weighted_mse_backward,
        (FILL[:, 0], Y.half(), X.mT.contiguous().mT, FILL, TOTAL, True, True),
    ),
    "area_weighted_mse_backward of features": (
        reconstruction_op._area_weighted_mse_backward,
        (FILL[:1, 0].expand(2), Y, X, FILL, TOTAL, False, True),
    ),
    "slot_assignment": (
        slot_op._slot_assignment,
        (FEATURES.half().mT.contiguous().mT, *START, *WEIGHTS, 3, 1e-5, True, True),
    ),
    "slot_assignment without the map": (
        slot_op._slot_assignment,
        (FEATURES, *HALF_START, *HALF_WEIGHTS, 1, 1e-5, False, False),
    ),
    "slot_update": (training_op._slot_update, (Q[:, 0], K[:, 0], K.mT.contiguous().mT[:, 1], 1e-5, True)),
    "slot_update without the map": (
        training_op._slot_update,
        (Q[:, 0].half(), K[:, 0].half(), K[:, 1].half(), 1e-5, False),
    ),
    "slot_update_backward": (
        training_op._slot_update_backward,
        (Q[:, 0], None, Q[:, 1].half(), K[:, 0].half(), K[:, 1].half(), Q[:, 0], FILL.abs(), 1e-5),
    ),
    "slot_update_backward with the map's": (
        training_op._slot_update_backward,
        (Q[:, 0], Q[:, 0, :, :12], Q[:, 1], K[:, 0], K.mT.contiguous().mT[:, 1], Q[:, 0], FILL.abs(), 1e-5),
    ),
}


def test_every_operator_is_checked_here() -> None:
    names = {name for name in dir(torch.ops.ocvtp_kernels) if not name.startswith("_") and name != "name"}
    assert {operator.name().split("::")[1] for operator, _ in OPERATORS.values()} == names


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, arguments = OPERATORS[name]
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_tell_shape_type_and_strides(name: str) -> None:
    operator, arguments = OPERATORS[name]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (real, fake)), strict=True)
    for ours, theirs in pairs:
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert ours.stride() == theirs.stride()


def test_public_functions_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        attention, fill, x, q, k = (mode.from_tensor(t) for t in (MAP, FILL, X, Q, K))
        kept, count, rows = select_rows(attention, 4, None, x, backend="triton")
        assert (kept.shape, count.shape, rows.shape) == ((2, 4), (2,), (2, 4, 5))
        assert gather_tokens(x, kept, backend="triton").shape == (2, 4, 5)
        assert select_tokens(attention, 9, backend="triton")[0].shape == (2, 9)
        assert farthest_points(x, 4, backend="triton").shape == (2, 4)
        assert largest_volume(x, 9, backend="triton").shape == (2, 9)
        assert received_attention(q, k, lse=q[..., 0], backend="triton").shape == (2, 12)
        merged = merge_tokens(x, kept, backend="triton")
        assert [t.shape for t in merged] == [(2, 4, 5), (2, 4), (2, 9)]
        losses = area_weighted_mse(x.clone(), x, attention, reduction="none", backend="triton")
        assert losses.shape == (2,)
        start, weights = (
            SlotStart(*map(mode.from_tensor, START)),
            FoldedWeights(*map(mode.from_tensor, WEIGHTS)),
        )
        features = mode.from_tensor(FEATURES)
        assert slot_assignment(features, start, weights, backend="triton").shape == (2, 3, 9)
        trained = SlotAttentionWeights(*map(mode.from_tensor, TRAINED))
        found = slot_attention(features, start.slots, trained, backend="triton")
        assert [t.shape for t in found] == [(2, 3, TINY[2]), (2, 3, 9)]
        found = top_tokens(features, start, weights, backend="triton")
        assert [t.shape for t in found] == [(2, 1, 3), (2, 9), (2, 9)]
        kept, count, rows = select_from_keys(found.keys, 4, fill, x, backend="triton")
        assert rows is not None
        assert (kept.shape, count.shape, rows.shape) == ((2, 4), (2,), (2, 4, 5))


# --------------------------------------------------------------------------------------------- compilation


def _selection_cases(grad: bool) -> list[Arguments]:
    sizes = ((2, 3, 20, 5, 4), (3, 4, 30, 6, 5), (4, 5, 40, 7, 6), (5, 6, 50, 9, 7), (2, 9, 60, 11, 8))
    return [
        (randn(b, k, n, seed=n), keep, randn(b, n, seed=k), randn(b, n, c, seed=c).requires_grad_(grad))
        for b, k, n, keep, c in sizes
    ]


def _gather_cases(grad: bool) -> list[Arguments]:
    sizes = ((2, 9, 5, 4), (3, 10, 6, 5), (4, 11, 7, 6), (5, 12, 8, 7))
    return [(randn(b, n, c, seed=n).requires_grad_(grad), indices(b, t, n)) for b, n, c, t in sizes]


def _attention_cases(grad: bool) -> list[Arguments]:
    sizes = ((2, 20, 21), (3, 30, 32), (4, 40, 43), (5, 150, 50))
    return [
        (randn(b, 2, m, 16, seed=m).requires_grad_(grad), randn(b, 2, n, 16, seed=n).requires_grad_(grad))
        for b, m, n in sizes
    ]


def _lse_cases(grad: bool) -> list[Arguments]:
    return [
        (q, k, (q @ k.mT).logsumexp(dim=-1).detach().requires_grad_(grad)) for q, k in _attention_cases(grad)
    ]


def _packed_cases(grad: bool) -> list[Arguments]:
    sizes = ((20, 2), (30, 3), (40, 4), (140, 5))
    return [
        (*(randn(1, 2, n, 16, seed=n + i).requires_grad_(grad) for i in range(2)), bounds(n, s))
        for n, s in sizes
    ]


def _keys_cases(grad: bool) -> list[Arguments]:
    return [(keys_of(a, 2 + keep % 6), keep, fill, x) for a, keep, fill, x in _selection_cases(grad)]


def _reconstruction_cases(grad: bool) -> list[Arguments]:
    """Features that differ in dtype and have no gradient, as encoders leave them."""
    sizes = ((2, 3, 20, 4), (3, 4, 30, 5), (4, 5, 40, 6), (5, 6, 50, 7))
    return [
        (
            randn(b, n, c, seed=n).requires_grad_(grad),
            randn(b, n, c, seed=c, dtype=torch.float16),
            randn(b, k, n, seed=k).softmax(dim=1),
        )
        for b, k, n, c in sizes
    ]


def _slot_cases(grad: bool) -> list[Arguments]:
    sizes = ((2, 3, 70), (3, 4, 80), (2, 5, 90), (4, 6, 130))
    return [
        (randn(b, n, TINY[0], seed=n).requires_grad_(grad), randn(1, k, TINY[2], seed=k)) for b, k, n in sizes
    ]


def _coverage_cases(grad: bool) -> list[Arguments]:
    return [
        (randn(batch, tokens, 5, seed=tokens), distinct(batch, keep, tokens))
        for batch, tokens, keep in ((2, 9, 4), (3, 12, 5), (4, 10, 6), (5, 11, 7))
    ]


def _merge_cases(grad: bool) -> list[Arguments]:
    """Features that differ in dtype from what is compared, masks, and owners of their own."""
    return [
        (
            randn(batch, tokens, 5, seed=tokens).requires_grad_(grad),
            kept,
            randn(batch, tokens, 4, seed=keep, dtype=torch.float16),
            kept < tokens - 2,
            indices(batch, tokens, keep),
        )
        for batch, tokens, keep in ((2, 9, 4), (3, 12, 5), (4, 10, 6), (5, 11, 7))
        for kept in (distinct(batch, keep, tokens),)
    ]


def _diversity_cases(grad: bool) -> list[Arguments]:
    return [
        (randn(batch, tokens, 5, seed=tokens), keep)
        for batch, tokens, keep in ((2, 9, 3), (3, 12, 4), (4, 10, 5), (5, 11, 6))
    ]


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[bool], list[Arguments]]]] = {
    "select_tokens": (
        lambda a, keep, fill, x: select_tokens(a, keep, None, backend="triton"),
        _selection_cases,
    ),
    "select_rows": (
        lambda a, keep, fill, x: select_rows(a, keep, fill, x, backend="triton"),
        _selection_cases,
    ),
    "select_from_keys": (
        lambda keys, keep, fill, x: select_from_keys(keys, keep, fill, backend="triton")[:2],
        _keys_cases,
    ),
    "rows_from_keys": (
        lambda keys, keep, fill, x: select_from_keys(keys, keep, fill, x, backend="triton"),
        _keys_cases,
    ),
    "gather_tokens": (lambda x, i: gather_tokens(x, i, backend="triton"), _gather_cases),
    "refine": (lambda x, i: refine(x, i, 1, backend="triton"), _coverage_cases),
    "coverage_error": (lambda x, i: coverage_error(x, i, backend="triton"), _coverage_cases),
    "merge_tokens": (
        lambda x, kept, compare, mask, owner: merge_tokens(x, kept, compare, mask, backend="triton")[::-1],
        _merge_cases,
    ),
    "nearest_kept": (
        lambda x, kept, compare, mask, owner: nearest_kept(x, kept, backend="triton"),
        _merge_cases,
    ),
    "merge_by": (
        lambda x, kept, compare, mask, owner: merge_by(x, owner, kept.shape[1], backend="triton"),
        _merge_cases,
    ),
    "farthest_points": (lambda x, keep: farthest_points(x, keep, backend="triton"), _diversity_cases),
    "largest_volume": (
        lambda x, keep: largest_volume(x, keep, ascending=False, backend="triton"),
        _diversity_cases,
    ),
    "slot_assignment": (
        lambda x, slots: slot_assignment(
            x, start_from_slots(slots, WEIGHTS), WEIGHTS, num_iters=2, backend="triton"
        ),
        _slot_cases,
    ),
    "top_tokens": (
        lambda x, slots: top_tokens(
            x, start_from_slots(slots, HALF_WEIGHTS), HALF_WEIGHTS, num_iters=1, backend="triton"
        ),
        _slot_cases,
    ),
    "slot_attention": (lambda x, slots: slot_attention(x, slots, TRAINED, backend="triton"), _slot_cases),
    "slot_attention, every iteration": (
        lambda x, slots: tuple(
            reversed(slot_attention(x, slots, TRAINED, num_iters=2, truncate=False, backend="triton"))
        ),
        _slot_cases,
    ),
    "received_attention": (lambda q, k: received_attention(q, k, backend="triton"), _attention_cases),
    "received_attention with lse": (
        lambda q, k, lse: received_attention(q, k, 1.0, lse=lse, backend="triton"),
        _lse_cases,
    ),
    "received_attention packed": (
        lambda q, k, cu: received_attention(q, k, cu_seqlens=cu, backend="triton"),
        _packed_cases,
    ),
    "area_weighted_mse": (
        lambda y, x, a: area_weighted_mse(y, x, a, reduction="none", backend="triton"),
        _reconstruction_cases,
    ),
    "area_weighted_mse, mean": (
        lambda y, x, a: area_weighted_mse(y, x, a, empty_slots="official", backend="triton"),
        _reconstruction_cases,
    ),
}
COMPILED = [
    *((name, False) for name in FUNCTIONS),
    ("select_rows", True),
    ("rows_from_keys", True),
    ("gather_tokens", True),
    ("merge_tokens", True),
    ("merge_by", True),
    *((name, True) for name in FUNCTIONS if "received" in name or "area" in name),
    *((name, True) for name in FUNCTIONS if name.startswith("slot_attention")),
]


def assert_compiles(name: str, grad: bool, sizes: int, graphs: int) -> None:
    """Compiled without a break, and equal to eager, forward and backward."""
    function, cases = FUNCTIONS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    assert len(cases(grad)) >= sizes
    for arguments in cases(grad)[:sizes]:
        got, want = (
            (r if isinstance(r, tuple) else (r,)) for r in (compiled(*arguments), function(*arguments))
        )
        assert counter.frame_count <= graphs
        assert all(map(torch.equal, got, want))
        if grad:
            leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
            weights = randn(*want[-1].shape, seed=7)
            pairs = zip(
                *(torch.autograd.grad((r[-1] * weights).sum(), leaves) for r in (got, want)), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "grad"), COMPILED)
def test_one_dynamic_graph_serves_all_sizes(name: str, grad: bool) -> None:
    """Two in all: the first call's sizes are taken for constants."""
    assert_compiles(name, grad, sizes=4, graphs=2)


def test_a_compiled_backward_pass_runs_the_kernel() -> None:
    """Not the formula that second derivatives take."""
    torch._dynamo.reset()
    (y, x, attention), *_ = _reconstruction_cases(True)
    compiled = torch.compile(
        lambda y, x: area_weighted_mse(y, x, attention, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    loss = compiled(y, x.float().requires_grad_())
    with recording() as launches:
        loss.backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["gradients"]


def test_a_tensor_that_is_target_and_reconstruction_compiles() -> None:
    torch._dynamo.reset()
    (y, _, attention), *_ = _reconstruction_cases(True)
    compiled = torch.compile(
        lambda t: area_weighted_mse(t, t, attention, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    assert float(compiled(y).detach()) == 0.0


def test_a_tensor_that_is_queries_and_keys_compiles() -> None:
    torch._dynamo.reset()
    q = Q.clone().requires_grad_()
    compiled = torch.compile(
        lambda t: received_attention(t, t, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q), received_attention(q, q, backend="triton"))


def test_the_way_from_features_to_rows_compiles() -> None:
    """One graph: keys need no look at their values."""
    torch._dynamo.reset()
    x = randn(2, 9, 5, seed=0)

    def kept(features: torch.Tensor) -> Any:
        found = top_tokens(features, START, WEIGHTS, backend="triton")
        return select_from_keys(found.keys, 4, found.largest, x, backend="triton")

    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(FEATURES), kept(FEATURES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_compiles_on_a_cpu(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 9, 16).to(dtype)
    compiled = torch.compile(received_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, q), received_attention(q, q))


# --------------------------------------------------------------------------------------------------- FLOPs


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: torch.Tensor) -> Any:
        return self.function(*arguments)


def folded_flops(num_iters: int, batch: int, slots: int, tokens: int, widths: Widths = TINY) -> int:
    """What PyTorch counts of its own products on the same weights."""
    arguments = problem(batch, slots, tokens, widths).arguments(torch.float32)
    with FlopCounterMode(display=False) as counter:
        slot_assignment(*arguments, num_iters=num_iters, backend="torch")
    return counter.get_total_flops()


COUNTED_KEYS = keys_of(randn(2, 3, 20, seed=2), 2)
#: function of (q [2, 3, 20, 16], k [2, 3, 30, 16], lse), floating-point operations
COUNTED: dict[str, tuple[Callable[..., Any], int]] = {
    "received_attention": (
        lambda q, k, lse: received_attention(q, k, backend="triton"),
        2 * 2 * 3 * 20 * 30 * 16,
    ),
    "with lse": (
        lambda q, k, lse: received_attention(q, k, lse=lse, backend="triton"),
        2 * 2 * 3 * 20 * 30 * 16,
    ),
    "packed": (
        lambda q, k, lse: received_attention(q[:1], q[:1], cu_seqlens=bounds(20, 4), backend="triton"),
        2 * 3 * 20 * 20 * 16 // 4,
    ),
    "packed with lse": (
        lambda q, k, lse: received_attention(
            q[:1], q[:1], lse=lse[:1], cu_seqlens=bounds(20, 2), backend="triton"
        ),
        2 * 3 * 20 * 20 * 16 // 2,
    ),
    "select_tokens": (lambda q, k, lse: select_tokens(lse, 5, backend="triton"), 0),
    "select_rows": (lambda q, k, lse: select_rows(lse, 5, None, q[:, 0], backend="triton")[2], 0),
    "gather_tokens": (lambda q, k, lse: gather_tokens(q[:, 0], indices(2, 5, 20), backend="triton"), 0),
    "select_from_keys": (
        lambda q, k, lse: select_from_keys(COUNTED_KEYS, 5, lse[:, 0], backend="triton")[0],
        0,
    ),
    "rows_from_keys": (
        lambda q, k, lse: select_from_keys(COUNTED_KEYS, 5, lse[:, 0], q[:, 0], backend="triton")[2],
        0,
    ),
    "coverage_error": (
        lambda q, k, lse: coverage_error(q[:, 0], distinct(2, 7, 20), backend="triton"),
        2 * 2 * 20 * 7 * 16,
    ),
    "refine": (
        lambda q, k, lse: refine(q[:, 0], distinct(2, 7, 20), 2, backend="triton"),
        2 * 2 * 20 * 7 * 16 * 5,
    ),
    "farthest_points": (
        lambda q, k, lse: farthest_points(q[:, 0], 7, backend="triton"),
        2 * 2 * 20 * 16 * 6,
    ),
    "largest_volume": (
        lambda q, k, lse: largest_volume(q[:, 0], 7, backend="triton"),
        2 * 2 * 20 * 16 * 6,
    ),
    "slot_assignment": (
        lambda q, k, lse: slot_assignment(FEATURES, START, WEIGHTS, backend="triton"),
        folded_flops(3, 2, 3, 9),
    ),
    "nearest_kept": (
        lambda q, k, lse: nearest_kept(q[:, 0], distinct(2, 7, 20), backend="triton")[1],
        2 * 2 * 20 * 7 * 16,
    ),
    "merge_by": (
        lambda q, k, lse: merge_by(q[:, 0], indices(2, 20, 7), 7, backend="triton"),
        2 * 20 * 16,
    ),
    "slot_update": (
        lambda q, k, lse: training_op.slot_update(q[:, 0], k[:, 0], k[:, 1], 1e-5, True)[0],
        2 * 2 * 2 * 20 * 30 * 16,
    ),
    "top_tokens": (
        lambda q, k, lse: (
            top_tokens(FEATURES, HALF_START, HALF_WEIGHTS, num_iters=1, backend="triton").largest
        ),
        folded_flops(1, 2, 3, 9),
    ),
    "area_weighted_mse": (
        lambda q, k, lse: area_weighted_mse(q[:, 0], k[:, 0, :20], lse, reduction="none", backend="triton"),
        2 * 20 * (3 * 16 + 2 * 3),
    ),
}
NO_GRADIENT = ("slot_assignment", "top_tokens")
INDICES_ALONE = (
    "select_tokens",
    "select_from_keys",
    "coverage_error",
    "refine",
    "nearest_kept",
    "farthest_points",
    "largest_volume",
)


def counted_inputs(grad: bool) -> Arguments:
    q, k = randn(2, 3, 20, 16, seed=0), randn(2, 3, 30, 16, seed=1)
    return q.requires_grad_(grad), k, randn(2, 3, 20, seed=2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_flops_for_pytorch(name: str, grad: bool) -> None:
    function, flops = COUNTED[name]
    with FlopCounterMode(display=False) as counter:
        function(*counted_inputs(grad))
    assert counter.get_total_flops() == flops
    seen = [str(key) for key in counter.get_flop_counts()["Global"]]
    assert [key for key in seen if "ocvtp_kernels" in key] == seen  # and no other operator counted instead
    assert len(seen) == 1


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [name for name in COUNTED if name not in (*NO_GRADIENT, *INDICES_ALONE)])
def test_flops_for_fvcore(name: str, grad: bool) -> None:
    """Half as many: fvcore counts a multiply-add once."""
    count = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    function, flops = COUNTED[name]
    analysis = count(Module(function), counted_inputs(grad)).set_op_handle(**_library.fvcore_handles())
    analysis.tracer_warnings("none")
    assert analysis.total() == flops // 2
    assert not [kind for kind in analysis.unsupported_ops() if "ocvtp" in kind or "PythonOp" in kind]


@pytest.mark.parametrize("name", [*NO_GRADIENT, *INDICES_ALONE])
def test_flops_for_fvcore_of_what_has_no_gradient(name: str) -> None:
    count = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    function, flops = COUNTED[name]
    analysis = count(Module(function), counted_inputs(False)).set_op_handle(**_library.fvcore_handles())
    analysis.tracer_warnings("none")
    assert analysis.total() == flops // 2
    assert not [kind for kind in analysis.unsupported_ops() if "ocvtp" in kind]


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
@pytest.mark.parametrize(("batch", "slots", "tokens", "widths"), [(1, 5, 20, TINY), (3, 70, 9, ODD)])
def test_flops_of_slot_assignment(
    batch: int, slots: int, tokens: int, widths: Widths, num_iters: int
) -> None:
    """Those of the products that the folded form makes in PyTorch."""
    arguments = problem(batch, slots, tokens, widths).arguments(torch.float32)
    with recording(), FlopCounterMode(display=False) as counter:
        slot_assignment(*arguments, num_iters=num_iters, backend="triton")
    assert counter.get_total_flops() == folded_flops(num_iters, batch, slots, tokens, widths)


@pytest.mark.parametrize("batch", [1, 64])
def test_flops_at_official_sizes(batch: int) -> None:
    """The floor that folded.py states."""
    p = official(batch)
    start, weights = half_of(*p.folded(torch.float32))
    with _arch.pretend("sm90"), FlopCounterMode(display=False) as counter:
        slot_op.assign(p.features, start, weights, 3, 1e-5, False, False)
    assert counter.get_total_flops() == pytest.approx(batch * 4.72e9, rel=0.005)


# ---------------------------------------------------------------------------------------------- CUDA graphs


@functools.cache
def official_weights(dtype: torch.dtype) -> tuple[SlotStart, FoldedWeights]:
    return problem(1, 64, 1, (1024, 2048, 512, 2048)).folded(dtype)


def _reconstruction_inputs(slots: int, tokens: int) -> Callable[[int], Arguments]:
    return lambda seed: (
        randn(2, tokens, 1024, seed=seed, dtype=torch.float16),
        randn(2, tokens, 1024, seed=seed + 1),
        (3 * randn(2, slots, tokens, seed=seed + 2)).softmax(dim=1),
    )


@functools.cache
def official_trained() -> SlotAttentionWeights:
    return SlotAttentionWeights(*(t.float() for t in problem(1, 64, 1, (1024, 2048, 512, 2048)).weights))


GRAPHED: dict[str, tuple[Callable[..., Any], Callable[[int], Arguments]]] = {
    "select_rows": (
        lambda a, fill, x: select_rows(a, 64, fill, x, backend="triton"),
        lambda seed: (
            randn(3, 64, 576, seed=seed),
            randn(3, 576, seed=seed + 1),
            randn(3, 576, 1024, seed=seed + 2, dtype=torch.float16),
        ),
    ),
    "select_from_keys": (
        lambda keys, scores, x: select_from_keys(keys, 64, scores, x, backend="triton"),
        lambda seed: (
            keys_of(randn(3, 64, 576, seed=seed), 9),
            randn(3, 576, seed=seed + 1),
            randn(3, 576, 1024, seed=seed + 2, dtype=torch.float16),
        ),
    ),
    "slot_assignment": (
        lambda x: slot_assignment(x, *official_weights(torch.float32), backend="triton", tf32=True),
        lambda seed: (randn(2, 577, 1024, seed=seed)[:, 1:],),
    ),
    "top_tokens": (
        lambda x: top_tokens(x, *official_weights(torch.float16), backend="triton"),
        lambda seed: (randn(2, 577, 1024, seed=seed, dtype=torch.float16)[:, 1:],),
    ),
    "slot_attention": (
        lambda x: slot_attention(
            x, official_weights(torch.float32)[0].slots, official_trained(), backend="triton"
        ),
        lambda seed: (randn(2, 577, 1024, seed=seed)[:, 1:],),
    ),
    "select_rows in two launches": (
        lambda a, x: select_rows(a, 64, None, x, backend="triton"),
        lambda seed: (randn(1, 160, 2880, seed=seed), randn(1, 2880, 64, seed=seed + 1)),
    ),
    "gather_tokens": (
        lambda x, i: gather_tokens(x, i, backend="triton"),
        lambda seed: (randn(2, 577, 100, seed=seed), indices(2, 64, 577 - seed)),
    ),
    "refine": (
        lambda x, i: refine(x, i, 2, backend="triton"),
        lambda seed: (randn(2, 576, 1024, seed=seed, dtype=torch.float16), distinct(2, 64, 576, seed)),
    ),
    "merge_tokens": (
        lambda x, kept, mask: merge_tokens(x, kept, None, mask, backend="triton")[::-1],
        lambda seed: (
            randn(2, 577, 1024, seed=seed, dtype=torch.float16)[:, 1:],
            distinct(2, 64, 576, seed),
            distinct(2, 64, 576, seed) < 570,
        ),
    ),
    "farthest_points": (
        lambda x: farthest_points(x, 64, backend="triton"),
        lambda seed: (randn(2, 576, 1024, seed=seed, dtype=torch.float16),),
    ),
    "largest_volume in a launch for each step": (
        lambda x: largest_volume(x, 64, backend="triton"),
        lambda seed: (randn(2, 2880, 1024, seed=seed, dtype=torch.float16),),
    ),
    "received_attention": (
        lambda q, k: received_attention(q, k, backend="triton"),
        lambda seed: tuple(randn(2, 16, 577, 64, seed=seed + i, dtype=torch.float16) for i in range(2)),
    ),
    "received_attention with lse": (
        lambda q, k, lse: received_attention(q, k, lse=lse, backend="triton"),
        lambda seed: (
            *(randn(2, 4, 577, 80, seed=seed + i, dtype=torch.bfloat16) for i in range(2)),
            randn(2, 4, 577, seed=seed + 2).abs() + 9,
        ),
    ),
    "received_attention packed": (
        lambda q, k, cu: received_attention(q, k, cu_seqlens=cu, backend="triton"),
        lambda seed: (
            *(randn(1, 4, 1000, 80, seed=seed + i, dtype=torch.bfloat16) for i in range(2)),
            torch.tensor([0, 10 + seed, 300, 300, 1000], device=DEVICE),
        ),
    ),
    "area_weighted_mse": (
        lambda y, x, a: area_weighted_mse(y, x, a, reduction="none", backend="triton"),
        _reconstruction_inputs(64, 576),
    ),
    "area_weighted_mse in tiles": (
        lambda y, x, a: area_weighted_mse(y, x, a, backend="triton"),
        _reconstruction_inputs(640, 2880),
    ),
}


@needs_gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_cuda_graph_replays_on_new_data(name: str) -> None:
    function, make = GRAPHED[name]
    static = make(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*static)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*static)
    for seed in (10, 20):
        fresh = make(seed)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        got, want = ((r if isinstance(r, tuple) else (r,)) for r in (captured, function(*fresh)))
        assert all(map(torch.equal, got, want))


@needs_gpu
@pytest.mark.parametrize(
    ("name", "grad"),
    [(name, grad) for name in GRAPHED for grad in (False, True) if not (grad and name in NO_GRADIENT)],
)
def test_no_host_synchronisation(name: str, grad: bool) -> None:
    function, make = GRAPHED[name]
    arguments = make(0)
    if grad:
        differentiable = arguments[-1] if name.startswith("select") else arguments[0]
        differentiable.requires_grad_()

    def call() -> None:
        result = function(*arguments)
        if grad:
            (result[-1] if isinstance(result, tuple) else result).sum().backward()

    call()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------- tile table


@pytest.mark.parametrize("arch", sorted({arch for _, arch, _ in table()}))
def test_the_table_has_the_rows_that_launchers_ask_for(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No others, and the launches that are compiled ahead of time reach them all."""
    asked: set[tuple[str, str, str]] = set()

    def tile(*key: str) -> Any:
        asked.add(key)
        return table()[key]

    def tile_of_rows(kernel: str, arch: str, shape: str, count: int) -> Any:
        found = _tiles.tile_of_rows(kernel, arch, shape, count)
        names = (shape, f"{shape}, few rows", f"{shape}, many rows")
        asked.add(next((kernel, arch, name) for name in names if table().get((kernel, arch, name)) is found))
        return found

    rows = {key for key in table() if key[1] == arch}
    modules = (selection_kernels, attention_kernels, reconstruction_kernels, coverage_kernels)
    modules += (_nearest, merge_kernels, diversity_kernels, slot_cut, slot_shapes, training_kernels)
    for module in modules:
        monkeypatch.setattr(module, "tile", tile)
    for module in (slot_cut, slot_loop):
        monkeypatch.setattr(module, "tile_of_rows", tile_of_rows)
    monkeypatch.setattr("bench.launches.kinds_of", lambda _: {})  # reads what only compiled kernels have
    launches.__wrapped__(arch)
    assert asked == rows
    asked.clear()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with _arch.pretend(arch), recording():
        for tokens in range(1, selection_shapes.MAX_TOKENS + 1):
            selection_kernels.select_tokens(empty(2, 7, tokens), 1, None, None)
        selection_kernels.select_tokens(empty(2, 70000, 1), 1, None, empty(2, 1, 3))
        selection_kernels.gather_tokens(empty(2, 3, 4), empty(2, 5, dtype=torch.int64))
        selection_kernels.scatter_tokens(empty(2, 5, 4), empty(2, 5, dtype=torch.int64), 3)
        for width in range(1, attention_shapes.MAX_HEAD_DIM + 1):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                q = empty(1, 2, 3, width, dtype=dtype)
                for cu_seqlens in (None, empty(3, dtype=torch.int32)):
                    attention_kernels.received_attention(q, q, 0.1, None, cu_seqlens)
        for slots, tokens in ((1, 1), (64, 1024), (64, 1025), (1, 65536), (1000, 2880)):
            x = empty(2, tokens, 3)
            reconstruction_kernels.area_weighted_mse(x, x, empty(2, slots, tokens), True, 0.5, 10.0)
            sums = empty(2, tokens), empty(2)
            reconstruction_kernels.area_weighted_mse_backward(empty(2), x, x, *sums, True, True)
        for slots in (1, 63, 64, 65, 128, 129, 256, 257, 1000):
            p = official(2, slots, 5)
            for start, weights in (p.folded(torch.float32), half_of(*p.folded(torch.float32))):
                found = slot_kernels.assign(p.features, start, weights, 2, 1e-5, False, False)
                assert found.keys.shape == (2, 1, slots)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                q, z = empty(2, slots, 32, dtype=dtype), empty(2, 5, 32, dtype=dtype)
                mean, mass, _ = training_kernels.slot_update(q, z, z, 1e-5, False)
                scratch = training_kernels.map_gradients(mean, None, q, z, z, mean, mass, 1e-5)
                assert scratch[2].shape == q.shape
        for kept in (1, 63, 64, 65, 1000):
            coverage_kernels.coverage(empty(2, 1000, 3), empty(2, kept, dtype=torch.int64), 1)
        owner = empty(2, 1000, dtype=torch.int64)
        means, mass = merge_kernels.merge_by(empty(2, 1000, 3), owner, 7)
        merge_kernels.spread_rows(means, owner, mass)
        for tokens, width in ((1, 1), (576, 384), (1000, 5000)):
            diversity_kernels.farthest_points(empty(2, tokens, width), 1)
            diversity_kernels.largest_volume(empty(2, tokens, width), 1)
    # Those for few and many rows are asked for where their bits were seen to be the same.
    assert asked == {key for key in rows if not key[2].endswith(" rows")}


def test_the_limits_are_those_of_the_launchers() -> None:
    """What the public functions let through, the launchers have sizes for; one more they have not."""
    assert max(selection_kernels._SIZES) == selection_shapes.MAX_TOKENS
    assert max(attention_kernels._HEAD_DIMS) == attention_shapes.MAX_HEAD_DIM
    assert all(width >= first + second for width, (_, first, second) in attention_kernels._HEAD_DIMS.items())
    assert all(width <= first + second for width, (_, first, second) in attention_kernels._HEAD_DIMS.items())


# ----------------------------------------------------------------------------------------------- backends


def _refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    half, double = Q.half(), Q.double()
    wide = torch.zeros(1, 1, 2, 129, device=DEVICE)
    many = torch.zeros(1, 2, selection_shapes.MAX_TOKENS + 1, device=DEVICE)
    packed = torch.zeros(1, 1, 4097, 16, device=DEVICE)
    x = X.to(torch.complex128)
    crowd = torch.zeros(65536, 1, 1, device=DEVICE)
    exotic = MAP.to(torch.float8_e8m0fnu)
    double_start, double_weights = SLOTS.folded(torch.float64)
    brain = FoldedWeights(*(t.bfloat16() for t in WEIGHTS))
    broad = WEIGHTS._replace(encoder_fc1_weight=torch.zeros(1, slot_shapes.MAX_WIDTH + 1, device=DEVICE))
    learned = FEATURES.clone().requires_grad_()
    wanted = "has no gradient: use torch.no_grad"
    return {
        "float64 weights": (
            lambda: slot_assignment(FEATURES, double_start, double_weights, backend="triton"),
            "slot_attention can't run its Triton kernel: .* the weights are torch.float64",
        ),
        "bfloat16 weights": (
            lambda: top_tokens(
                FEATURES, START._replace(queries=START.queries.bfloat16()), brain, backend="triton"
            ),
            "the weights are torch.bfloat16",
        ),
        "float64 features": (
            lambda: top_tokens(FEATURES.double(), START, WEIGHTS, backend="triton"),
            "features in float32, float16 and bfloat16, not torch.float64",
        ),
        "16385 channels": (
            lambda: top_tokens(broad.encoder_fc1_weight[None], START, broad, backend="triton"),
            "up to 16384 channels; got 16385",
        ),
        "65536 images of features": (
            lambda: top_tokens(
                torch.zeros(65536, 1, TINY[0], device=DEVICE), START, WEIGHTS, backend="triton"
            ),
            "up to 65535 images; got 65536",
        ),
        "gradient of features": (lambda: slot_assignment(learned, START, WEIGHTS, backend="triton"), wanted),
        "gradient of slots": (
            lambda: slot_assignment(
                FEATURES,
                START._replace(slots=START.slots.clone().requires_grad_()),
                WEIGHTS,
                backend="triton",
            ),
            wanted,
        ),
        "gradient of weights": (
            lambda: top_tokens(
                FEATURES,
                START,
                WEIGHTS._replace(mlp_fc2_bias=WEIGHTS.mlp_fc2_bias.clone().requires_grad_()),
                backend="triton",
            ),
            wanted,
        ),
        "float64 scores": (
            lambda: select_from_keys(KEYS, 4, FILL.double(), backend="triton"),
            "these are torch.float64",
        ),
        "too many scores": (lambda: select_from_keys(KEYS[:1], 4, many[:, 0], backend="triton"), "got 4097"),
        "complex128 rows from keys": (
            lambda: select_from_keys(KEYS, 4, FILL, x, backend="triton"),
            "x is torch.complex128",
        ),
        "float64 map": (lambda: select_tokens(MAP.double(), 4, backend="triton"), "these are torch.float64"),
        "float64 fill": (
            lambda: select_tokens(MAP, 4, FILL.double(), backend="triton"),
            "these are torch.float64",
        ),
        "too many tokens": (lambda: select_tokens(many, 4, backend="triton"), f"got {many.shape[2]}"),
        "float8 map": (lambda: select_tokens(exotic, 4, backend="triton"), "float8_e8m0fnu"),
        "65536 images": (
            lambda: gather_tokens(crowd, crowd[..., 0].long(), backend="triton"),
            "up to 65535 images",
        ),
        "65536 heads": (
            lambda: received_attention(crowd[None], crowd[None], backend="triton"),
            r"got \[1, 65536\]",
        ),
        "complex128 rows": (lambda: select_rows(MAP, 4, None, x, backend="triton"), "x is torch.complex128"),
        "float64 reconstruction": (
            lambda: area_weighted_mse(X.double(), X, MAP, backend="triton"),
            "reconstruction can't run its Triton kernel: it computes in float32, and reconstruction is .*64",
        ),
        "float64 target": (
            lambda: area_weighted_mse(X, X.double(), MAP, backend="triton"),
            "and features is torch.float64",
        ),
        "float64 weights of tokens": (
            lambda: area_weighted_mse(X, X, MAP.double(), backend="triton"),
            "and slot_attention is torch.float64",
        ),
        "65536 reconstructions": (
            lambda: area_weighted_mse(crowd, crowd, crowd, backend="triton"),
            "up to 65535 images; got 65536",
        ),
        "complex128 gather": (
            lambda: gather_tokens(x, indices(2, 3, 9), backend="triton"),
            "x is torch.complex128",
        ),
        "65536 images to compare": (
            lambda: nearest_kept(crowd, crowd[..., 0].long(), backend="triton"),
            "merge can't run its Triton kernel: it takes up to 65535 images; got 65536",
        ),
        "65536 images to merge": (
            lambda: merge_by(crowd, crowd[..., 0].long(), 1, backend="triton"),
            "up to 65535 images; got 65536",
        ),
        "float64 q": (
            lambda: received_attention(double, double, backend="triton"),
            "q and k are torch.float64",
        ),
        "q and k differ": (lambda: received_attention(half, Q, backend="triton"), "q is .*16 and k is .*32"),
        "head dim 129": (lambda: received_attention(wide, wide, backend="triton"), "head dim is at most 128"),
        "4097 segments": (
            lambda: received_attention(packed, packed, cu_seqlens=bounds(4097, 4097), backend="triton"),
            "up to 4096 segments; got 4097",
        ),
    }


@pytest.mark.parametrize("case", _refusals())
def test_what_kernels_refuse(case: str) -> None:
    call, reason = _refusals()[case]
    with pytest.raises(BackendUnavailableError, match=reason):
        call()


def test_gradients_that_are_not_wanted_are_not_refused() -> None:
    features = FEATURES.clone().requires_grad_()
    with torch.no_grad():
        got = slot_assignment(features, START, WEIGHTS, num_iters=1, backend="triton")
    assert torch.equal(got, slot_assignment(FEATURES, START, WEIGHTS, num_iters=1, backend="triton"))
    assert not got.requires_grad


@interpreter_only
def test_the_interpreter_cannot_multiply_bfloat16() -> None:
    q = Q.bfloat16()
    with pytest.raises(BackendUnavailableError, match="interpreter can't multiply bfloat16"):
        received_attention(q, q, backend="triton")
    assert received_attention(q, q).shape == (2, 9)


CALLS: dict[str, Callable[[str], Any]] = {
    "select_tokens": lambda backend: select_tokens(MAP, 4, backend=backend),
    "select_rows": lambda backend: select_rows(MAP, 4, None, X, backend=backend),
    "gather_tokens": lambda backend: gather_tokens(X, indices(2, 3, 9), backend=backend),
    "merge_tokens": lambda backend: merge_tokens(X, distinct(2, 3, 9), backend=backend),
    "received_attention": lambda backend: received_attention(Q, K, backend=backend),
    "select_from_keys": lambda backend: select_from_keys(KEYS, 4, FILL, X, backend=backend),
    "area_weighted_mse": lambda backend: area_weighted_mse(X, X, MAP, backend=backend),
    "slot_assignment": lambda backend: slot_assignment(FEATURES, START, WEIGHTS, backend=backend),
    "top_tokens": lambda backend: top_tokens(FEATURES, START, WEIGHTS, backend=backend),
    "slot_attention": lambda backend: slot_attention(FEATURES, START.slots, TRAINED, backend=backend),
}


@pytest.mark.parametrize("call", CALLS)
def test_why_no_kernel_runs(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason by its name. ``"auto"`` on a CPU doesn't ask; on a GPU it falls back."""
    monkeypatch.setattr(_arch, "has_triton", lambda: False)
    with pytest.raises(BackendUnavailableError, match="triton is not installed"):
        CALLS[call]("triton")
    monkeypatch.setattr(_arch, "has_triton", lambda: True)
    monkeypatch.setattr(_arch, "interpreting", lambda: False)
    if ON_GPU:
        monkeypatch.setattr(_arch, "architecture", lambda _: None)
        with pytest.raises(BackendUnavailableError, match="no tiles were made for"):
            CALLS[call]("triton")
        return
    with pytest.raises(BackendUnavailableError, match="GPU, not cpu"):
        CALLS[call]("triton")

    def asked(*_: Any) -> None:
        raise AssertionError("asked about kernels")

    for name in ("why_no_kernels", "_why_not"):
        monkeypatch.setattr(_backend, name, asked)
    CALLS[call]("auto")
    CALLS[call]("torch")


def test_an_unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arch, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    for capability, arch in (((7, 5), None), ((8, 9), "sm86"), ((9, 0), "sm90"), ((10, 3), "sm100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert _arch.architecture(device) == arch
        reason = _arch.why_no_kernels(device)
        assert (reason is None) == (arch is not None)
        if arch is None:
            with pytest.raises(BackendUnavailableError, match="no tiles were made for Tesla T4"):
                _backend.resolve_backend("triton", "selection", device)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    for name, arch in (("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", None)):
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert _arch.architecture(device) == arch


def test_every_known_architecture_has_tiles() -> None:
    assert {*_arch._CUDA.values(), *_arch._HIP, _arch._INTERPRETED} == {arch for _, arch, _ in table()}


def test_auto_logs_each_reason_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_backend, "_said", set())
    reasons = iter(["cold", "cold", "wet", "cold", None, None])
    monkeypatch.setattr(_backend, "why_no_kernels", lambda _: next(reasons))
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, logger="ocvtp_kernels"):
        chosen = [_backend.resolve_backend("auto", "selection", device) for _ in range(4)]
        assert chosen == ["torch"] * 4
        assert _backend.resolve_backend("auto", "selection", device, lambda: "x is odd") == "torch"
        assert _backend.resolve_backend("auto", "selection", device) == "triton"
        assert _backend.resolve_backend("torch", "selection", device) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        f"selection runs its PyTorch reference: {reason}" for reason in ("cold", "wet", "x is odd")
    ]


# Every public function with backend="auto" on a CPU; then which of our modules that need Triton were loaded.
ON_A_CPU = """
import sys
if {blocked}: sys.modules["triton"] = None
import torch
from ocvtp_kernels.merge import merge_tokens
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.reconstruction import area_weighted_mse
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.slot_attention import SlotAttentionWeights, fold, start_from_slots
from ocvtp_kernels.slot_attention import slot_attention, top_tokens
m, v, gates, gate = torch.rand(4, 4), torch.rand(4), torch.rand(12, 4), torch.rand(12)
trained = SlotAttentionWeights(
    v, v, m, v, m, v, v, v, v, v, m, m, m, gates, gates, gate, gate, v, v, m, v, m, v
)
w = fold(trained)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    a, x = torch.rand(2, 3, 9).to(dtype), torch.rand(2, 9, 4, dtype=dtype, requires_grad=True)
    indices, _, rows = select_rows(a, 4, None, x)
    gather_tokens(x, indices).sum().backward()
    merge_tokens(x, indices).rows.sum().backward()
    area_weighted_mse(x, x.detach(), a).backward()
    select_tokens(a, 4, a[:, 0])
    found = top_tokens(x.detach().float(), start_from_slots(torch.rand(1, 3, 4), w), w)
    slot_attention(x.float(), torch.rand(1, 3, 4), trained)[0].sum().backward()
    select_from_keys(found.keys, 4, found.largest.to(dtype), x)[2].sum().backward()
    q = torch.rand(1, 2, 9, 16).to(dtype).requires_grad_()
    received_attention(q, q, cu_seqlens=torch.tensor([0, 4, 9])).sum().backward()
    loaded = [name for name in sys.modules if name.startswith("ocvtp_kernels.")]
    print(dtype, *(name for name in loaded if name.endswith((".triton", "._jit", "._nearest"))))
"""


@functools.cache
def loaded_on_a_cpu(blocked: bool) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", ON_A_CPU.format(blocked=blocked)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16", "torch.bfloat16"])
def test_auto_on_a_cpu_never_touches_triton(blocked: bool, dtype: str) -> None:
    assert dtype in loaded_on_a_cpu(blocked)  # a line of its own, and no module on it
