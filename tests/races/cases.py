"""Calls that reach every kernel, and every branch of it, with more than one program for each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch

from ocvtp import PrunerConfig
from ocvtp_kernels.coverage import triton as coverage
from ocvtp_kernels.diversity import triton as diversity
from ocvtp_kernels.merge import triton as merge
from ocvtp_kernels.received_attention import triton as received
from ocvtp_kernels.reconstruction import triton as reconstruction
from ocvtp_kernels.selection import triton as selection
from ocvtp_kernels.slot_attention import loop
from ocvtp_kernels.slot_attention import triton as slots
from ocvtp_kernels.slot_attention.folded import fold, start_from_slots
from ocvtp_kernels.slot_attention.training import triton as training
from tests.conftest import make_pruner
from tests.kernels.triton_device import randn

HALF, SINGLE = torch.float16, torch.float32
Results = tuple[torch.Tensor | None, ...]
Call = Callable[[], Results]


class Case(NamedTuple):
    """A call, made from nothing: the same numbers each time."""

    name: str
    make: Callable[[], Call]
    thorough: bool = False  # too slow for every day


def _tuple(made: torch.Tensor | tuple[torch.Tensor | None, ...]) -> Results:
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


def _view(batch: int, tokens: int, width: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """Features without a class token: a view with something before, between and after its images."""
    return randn(batch, tokens + 2, width, seed=1, dtype=dtype)[:, 1:-1]


def _indices(batch: int, tokens: int, keep: int) -> torch.Tensor:
    order = randn(batch, tokens, seed=2).argsort(dim=1)
    return order[:, :keep].contiguous()


def _slots(
    tokens: int,
    count: int,
    dtype: torch.dtype,
    *,
    batch: int = 2,
    per_image: bool = False,
    map_: bool = False,
) -> Callable[[], Call]:
    def make() -> Call:
        pruner = make_pruner(PrunerConfig(in_dim=24, hidden_dim=136, slot_dim=40, ffn_dim=72))
        weights = fold(pruner.weights(), dtype)
        start = start_from_slots(randn(batch if per_image else 1, count, 40, seed=3), weights)
        x = _view(batch, tokens, 24)

        def call() -> Results:
            with loop.up_to(0):  # test_ordered_loop.py has the loop in one launch
                return tuple(slots.assign(x, start, weights, 2 + per_image, 1e-5, False, map_))

        return call

    return make


def _training(tokens: int, count: int, dtype: torch.dtype, *, map_: bool) -> Callable[[], Call]:
    def make() -> Call:
        q = randn(2, count, 40, seed=4, dtype=dtype)
        k, v = (randn(2, tokens, 40, seed=seed, dtype=dtype) for seed in (5, 6))
        grad = randn(2, count, 40, seed=7)
        grad_map = randn(2, count, tokens, seed=8) if map_ else None

        def call() -> Results:
            mean, mass, attention = training.slot_update(q, k, v, 1e-5, map_)
            return mean, mass, attention, *training.map_gradients(grad, grad_map, q, k, v, mean, mass, 1e-5)

        return call

    return make


def _select(
    count: int, tokens: int, keep: int, *, fill: bool = True, rows: bool = True, parts: bool = False
) -> Callable[[], Call]:
    """``parts``: a launch of its own marks tokens, as in a larger map."""

    def make() -> Call:
        attention = randn(2, count + 1, tokens + 3, seed=9).softmax(dim=1)[:, 1:, :-3]
        scores = randn(2, 2 * tokens, seed=10)[:, ::2] if fill else None
        x = _view(2, tokens, 24) if rows else None

        def call() -> Results:
            with mock.patch.object(selection, "_SCAN_LIMIT", 0 if parts else selection._SCAN_LIMIT):
                return selection.select_tokens(attention, keep, scores, x)

        return call

    return make


def _select_from_keys() -> Call:
    tokens, keep = 150, 33
    token = 0x7FFFFFFF - torch.arange(2 * 3 * 20).view(2, 3, 20) * 7 % tokens
    keys = (randn(2, 3, 20, seed=11).abs().view(torch.int32).long() << 32) | token
    scores, x = randn(2, tokens, seed=12), _view(2, tokens, 24)
    return lambda: selection.select_from_keys(keys, keep, scores, x)


def _gather_and_scatter() -> Call:
    x, rows = _view(2, 19, 130, SINGLE), randn(2, 21, 130, seed=13)
    indices = torch.arange(42).view(2, 21) * 11 % 17  # several times the same
    return lambda: (selection.gather_tokens(x, indices), selection.scatter_tokens(rows, indices, 19))


def _received(
    width: int, *, queries: int = 131, keys: int = 150, dtype: torch.dtype = HALF, lse: bool = False,
    bounds: tuple[int, ...] = (), ragged: bool = False, batch: int = 1, heads: int = 2,
) -> Callable[[], Call]:  # fmt: skip
    def make() -> Call:
        q, k = (
            randn(batch, length, heads, width + ragged, seed=seed, dtype=dtype)[..., ragged:].transpose(1, 2)
            for length, seed in ((queries, 14), (keys, 15))
        )
        sums = randn(batch, heads, queries, seed=16) + 5 if lse else None
        segments = torch.tensor(bounds, dtype=torch.int32) if bounds else None
        return lambda: _tuple(received.received_attention(q, k, width**-0.5, sums, segments))

    return make


def _reconstruction(count: int, tokens: int, *, whole: bool = True) -> Callable[[], Call]:
    """Not ``whole``: every tile of tokens counts for itself, as in a larger map."""

    def make() -> Call:
        y, x = randn(2, tokens, 40, seed=17), _view(2, tokens, 40)
        attention = randn(2, count, tokens, seed=18).softmax(dim=1)
        grad = torch.ones(1).expand(2)

        def call() -> Results:
            with mock.patch.object(reconstruction, "_WHOLE_LIMIT", 65536 if whole else 0):
                loss, weights, total = reconstruction.area_weighted_mse(y, x, attention, True, 0.5, 10.0)
            back = reconstruction.area_weighted_mse_backward(grad, y, x, weights, total, True, True)
            return loss, weights, total, *back

        return call

    return make


def _coverage(tokens: int, keep: int, rounds: int = 1) -> Callable[[], Call]:
    def make() -> Call:
        x, indices = _view(2, tokens, 70), _indices(2, tokens, keep)
        return lambda: coverage.coverage(x, indices, rounds)

    return make


def _merge(tokens: int, keep: int) -> Callable[[], Call]:
    def make() -> Call:
        x, indices = _view(2, tokens, 40), _indices(2, tokens, keep)
        mask = torch.arange(keep).expand(2, keep) % 5 != 1

        def call() -> Results:
            owner = merge.nearest_kept(x, indices, mask)
            rows, mass = merge.merge_by(x, owner, keep)
            return owner, rows, mass, merge.spread_rows(rows, owner, mass)

        return call

    return make


def _diversity(tokens: int, width: int, keep: int, small: int) -> Callable[[], Call]:
    def make() -> Call:
        x = _view(2, tokens, width)
        start = torch.where(torch.arange(keep) % 2 == 0, _indices(2, tokens, keep), -1)

        def call() -> Results:
            chosen = None if small else diversity.farthest_points(x, keep, small)
            return (
                chosen,
                diversity.farthest_points(x, keep, small, start),
                diversity.largest_volume(x, keep, small),
            )

        return call

    return make


#: Sizes are no multiples of anything; small, for an operation on a block takes a fraction of a millisecond.
CASES = (
    Case("slots, one tile", _slots(67, 17, HALF, map_=True)),
    Case("slots, chunks, an image's own", _slots(67, 270, HALF, per_image=True), thorough=True),
    Case("slots, chunks", _slots(67, 270, SINGLE, batch=1)),
    Case("slots, one tile, float32", _slots(67, 35, SINGLE, per_image=True, map_=True), thorough=True),
    Case("slots, more tiles", _slots(131, 70, HALF), thorough=True),
    Case("slots, more tiles, float32", _slots(131, 130, SINGLE), thorough=True),
    Case("slots, chunks, float32", _slots(131, 270, SINGLE), thorough=True),
    Case("training, one tile", _training(67, 7, HALF, map_=True)),
    Case("training, chunks", _training(65, 140, SINGLE, map_=False)),
    Case("training, one tile, float32", _training(131, 70, SINGLE, map_=False), thorough=True),
    Case("training, chunks, float16", _training(131, 140, HALF, map_=True), thorough=True),
    Case("select, scanned", _select(5, 100, 9)),
    Case("select, scanned, no scores", _select(5, 100, 9, fill=False), thorough=True),
    Case("select, parts", _select(20, 150, 9, parts=True)),
    Case("select, parts, no scores nor rows", _select(20, 150, 9, fill=False, rows=False, parts=True)),
    Case("select, many tokens", _select(40, 2100, 40), thorough=True),
    Case("select, most tokens compete", _select(300, 300, 40), thorough=True),
    Case("select, keys", _select_from_keys, thorough=True),
    Case("gather, scatter", _gather_and_scatter),
    Case("received, d=64", _received(64)),
    Case("received, d=72, given sums", _received(72, lse=True, batch=2, heads=1)),
    Case("received, packed", _received(64, queries=150, heads=1, bounds=(0, 1, 1, 66, 150))),
    Case("received, ragged, float32", _received(40, queries=70, keys=70, dtype=SINGLE, ragged=True, heads=1)),
    Case("received, d=96", _received(96, batch=2), thorough=True),
    Case("received, d=128", _received(128, queries=257, keys=300), thorough=True),
    Case("received, packed, d=80", _received(80, queries=150, bounds=(0, 64, 128, 150)), thorough=True),
    Case("reconstruction, whole", _reconstruction(9, 35)),
    Case("reconstruction, tiles", _reconstruction(9, 70, whole=False)),
    Case("reconstruction, more tiles", _reconstruction(200, 330), thorough=True),
    Case("coverage", _coverage(67, 9)),
    Case("coverage, more rounds", _coverage(1100, 70, 2), thorough=True),
    Case("merge", _merge(67, 5)),
    Case("merge, more", _merge(300, 70), thorough=True),
    Case("diversity, one program", _diversity(35, 40, 3, 2**20)),
    Case("diversity, a launch a step", _diversity(35, 40, 3, 0)),
    Case("diversity, wide tokens", _diversity(40, 1100, 4, 0), thorough=True),
)
