"""What is counted: every operation, in kernels and in PyTorch, and the pruner, at sizes of published models.

Tensors are on ``meta``. Sizes: those of LLaVA-1.5 (576 tokens, 64 kept) unless a name says 2880: all tiles of
LLaVA-NeXT at once, 160 kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import ocvtp
from ocvtp_kernels.coverage import coverage_error, refine
from ocvtp_kernels.diversity import farthest_points, largest_volume
from ocvtp_kernels.merge import merge_by, merge_tokens, nearest_kept
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.reconstruction import area_weighted_mse
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotStart,
    fold,
    slot_assignment,
    slot_attention,
    start_from_slots,
    top_tokens,
)

Call = Callable[[], object]
#: Of a backend.
Operation = Callable[[str], Any]

HALF = torch.float16
WIDTH, SLOT = 1024, 512
BACKENDS = ("triton", "torch")
# Products in float16 are the kernels' alone.
_KERNELS_ONLY = "fp16"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, Call]:
    """Calls by name, made anew: ``"operation, what is special (backend)"``."""
    return {
        f"{name} ({backend})": functools.partial(call, backend)
        for backend in BACKENDS
        for name, call in _operations()
        if not (backend == "torch" and _KERNELS_ONLY in name)
    }


def _operations() -> Iterator[tuple[str, Operation]]:
    yield from _selection()
    yield from _received_attention()
    yield from _reconstruction()
    yield from _slots()
    yield from _training()
    yield from _coverage()
    yield from _merge()
    yield from _diversity()
    yield from _pruner()


def _selection() -> Iterator[tuple[str, Operation]]:
    for size, slots, tokens, keep in (("", 64, 576, 64), (", 2880", 160, 2880, 160)):
        attention, fill = empty(2, slots, tokens), empty(2, tokens)
        rows = empty(2, tokens, WIDTH, dtype=HALF)
        keys = empty(2, 9, slots, dtype=torch.int64)
        yield f"select_rows{size}", _with(select_rows, attention, keep, fill, rows)
        yield f"select_tokens{size}", _with(select_tokens, attention, keep)
        yield f"select_from_keys{size}", _with(select_from_keys, keys, keep, fill)
        yield f"rows_from_keys{size}", _with(select_from_keys, keys, keep, fill, rows)
    kept, x = empty(2, 64, dtype=torch.int64), empty(2, 576, WIDTH, dtype=HALF)
    yield "gather_tokens", _with(gather_tokens, x, kept)
    leaf = x.detach().requires_grad_()
    yield "gather_tokens, backward", _backward(_with(gather_tokens, leaf, kept), leaf)


def _received_attention() -> Iterator[tuple[str, Operation]]:
    q = empty(1, 577, 16, 64, dtype=HALF).transpose(1, 2)  # as a projection leaves them
    yield "received_attention", _with(received_attention, q, q)
    yield "received_attention, lse", _with(received_attention, q, q, lse=empty(1, 16, 577))
    packed = empty(1, 4000, 16, 80, dtype=HALF).transpose(1, 2)
    bounds = empty(61, dtype=torch.int32)
    yield "received_attention, packed", _with(received_attention, packed, packed, cu_seqlens=bounds)
    leaves = [empty(1, 16, 577, 64).requires_grad_() for _ in range(2)]
    yield "received_attention, backward", _backward(_with(received_attention, *leaves), *leaves)


def _reconstruction() -> Iterator[tuple[str, Operation]]:
    for size, slots, tokens in (("", 64, 576), (", 2880", 640, 2880)):
        x, map_ = empty(2, tokens, WIDTH), empty(2, slots, tokens)
        loss = functools.partial(_with, area_weighted_mse, reduction="none")
        yield f"area_weighted_mse{size}", loss(x, x, map_)
        leaf = x.detach().requires_grad_()
        yield f"area_weighted_mse, backward{size}", _backward(loss(leaf, x, map_), leaf)


def _slots() -> Iterator[tuple[str, Operation]]:
    for size, images, slots, tokens in (
        ("", 1, 64, 576),
        (", 64 images", 64, 64, 576),
        (", 2880", 1, 160, 2880),
    ):
        x = empty(images, tokens, WIDTH, dtype=HALF)
        yield f"top_tokens fp16{size}", _with(top_tokens, x, *folded(slots, HALF))
    for precision, dtype in (("fp16", HALF), ("fp32", torch.float32)):
        x = empty(1, 576, WIDTH, dtype=dtype)
        yield f"slot_assignment {precision}", _with(slot_assignment, x, *folded(64, dtype))
    yield "top_tokens fp32", _with(top_tokens, x, *folded(64, torch.float32))


def _training() -> Iterator[tuple[str, Operation]]:
    pruner = _module()
    x, start = empty(2, 576, WIDTH), empty(1, 64, SLOT)
    run = _with(slot_attention, x, start, pruner.weights())
    yield "slot_attention, forward", _without_gradient(run)
    parameters = list(pruner.slot_attention.parameters())

    def slots_alone(backend: str) -> torch.Tensor:
        made: torch.Tensor = run(backend)[0]
        return made

    yield "slot_attention, forward and backward", _backward(slots_alone, *parameters)


def _coverage() -> Iterator[tuple[str, Operation]]:
    x, kept = empty(1, 576, WIDTH, dtype=HALF), empty(1, 64, dtype=torch.int64)
    yield "coverage_error", _with(coverage_error, x, kept)
    for rounds in (1, 2):
        yield f"refine, rounds {rounds}", _with(refine, x, kept, rounds)


def _merge() -> Iterator[tuple[str, Operation]]:
    for size, tokens, keep in (("", 576, 64), (", 2880", 2880, 160)):
        x, kept = empty(1, tokens, WIDTH, dtype=HALF), empty(1, keep, dtype=torch.int64)
        yield f"merge_tokens{size}", _with(merge_tokens, x, kept)
    x, kept, mask = empty(2, 576, WIDTH, dtype=HALF), empty(2, 64, dtype=torch.int64), empty(2, 64) > 0
    yield "nearest_kept, masked", _with(nearest_kept, x, kept, mask)
    leaf, owner = x.detach().requires_grad_(), empty(2, 576, dtype=torch.int64)
    yield "merge_by, backward", _backward(_with(merge_by, leaf, owner, 64), leaf)


def _diversity() -> Iterator[tuple[str, Operation]]:
    x, large = empty(2, 576, WIDTH, dtype=HALF), empty(1, 2880, WIDTH, dtype=HALF)
    for choose in (farthest_points, largest_volume):
        yield choose.__name__, _with(choose, x, 64)
        yield f"{choose.__name__}, 2880", _with(choose, large, 160)


def _pruner() -> Iterator[tuple[str, Operation]]:
    for images in (1, 4):
        x, fill = empty(images, 576, WIDTH, dtype=HALF), empty(images, 576)
        yield f"pruner, images {images}", _with(_module(), x, 64, fill)
    yield "pruner, refine 2", _with(_module(), x[:1], 64, fill[:1], refine=2)


@functools.cache
def _module() -> ocvtp.OCPruner:
    """A pruner of the published size."""
    with torch.device("meta"):
        return ocvtp.OCPruner().eval()


def folded(slots: int, dtype: torch.dtype) -> tuple[SlotStart, FoldedWeights]:
    """What a pruner's first call makes of its parameters, and later ones find."""
    weights = fold(_module().weights(), dtype)
    return start_from_slots(empty(1, slots, SLOT, dtype=weights.mlp_fc2_bias.dtype), weights), weights


def _with(function: Callable[..., Any], *arguments: Any, **options: Any) -> Operation:
    return lambda backend: function(*arguments, backend=backend, **options)


def _without_gradient(operation: Operation) -> Operation:
    def run(backend: str) -> object:
        with torch.no_grad():
            return operation(backend)

    return run


def _backward(operation: Operation, *leaves: torch.Tensor) -> Operation:
    """Forward, and the gradients of ``leaves``."""

    def run(backend: str) -> object:
        result = operation(backend)
        return torch.autograd.grad(result, leaves, torch.empty_like(result), allow_unused=True)

    return run
