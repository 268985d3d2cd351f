"""Whether kernels are compiled anew for another number of images: a server would wait for each.

Triton compiles anew where an integer becomes 1, or a multiple of 16, or is neither any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.launches import _folded_weights, kinds_of
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import recording
from ocvtp_kernels.coverage import triton as coverage
from ocvtp_kernels.diversity import triton as diversity
from ocvtp_kernels.merge import triton as merge
from ocvtp_kernels.received_attention import triton as received_attention
from ocvtp_kernels.reconstruction import triton as reconstruction
from ocvtp_kernels.selection import triton as selection
from ocvtp_kernels.selection.shapes import FLAG, GRID
from ocvtp_kernels.slot_attention import SlotStart, loop
from ocvtp_kernels.slot_attention import triton as slot_attention
from ocvtp_kernels.slot_attention.training import triton as slot_training

HALF = torch.float16


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _features(batch: int) -> torch.Tensor:
    return _empty(batch, 577, 1024, dtype=HALF)[:, 1:]  # behind the class token


def _indices(batch: int, kept: int) -> torch.Tensor:
    return _empty(batch, kept, dtype=torch.int64)


def _select_tokens(batch: int, kept: int) -> None:
    attention, fill = _empty(batch, kept, 576), _empty(batch, 576)
    for scores in (fill, None):
        selection.select_tokens(attention, kept, scores, _features(batch), FLAG)
        selection.select_tokens(attention, kept, scores, None, GRID)
    selection.select_tokens(_empty(batch, 3 * kept, 576), kept, None, None, FLAG)  # in parts


def _select_from_keys(batch: int, kept: int) -> None:
    keys, finite = _empty(batch, 9, kept, dtype=torch.int64), _empty(batch, 576, dtype=torch.bool)
    # Of the class token's row [B, 577], as adapters slice it, or as a kernel leaves it.
    for scores in (_empty(batch, 576), _empty(batch, 577)[:, 1:]):
        selection.select_from_keys(keys, kept, scores, _features(batch), finite, FLAG)


def _gather(batch: int, kept: int) -> None:
    rows = selection.gather_tokens(_features(batch), _indices(batch, kept))
    selection.scatter_tokens(rows, _indices(batch, kept), 576)


def _coverage(batch: int, kept: int) -> None:
    coverage.coverage(_features(batch), _indices(batch, kept), 1)


def _merge(batch: int, kept: int) -> None:
    x = _features(batch)
    owner = merge.nearest_kept(x, _indices(batch, kept), None)
    rows, mass = merge.merge_by(x, owner, kept)
    merge.spread_rows(rows, owner, mass)


def _diversity(batch: int, kept: int) -> None:
    diversity.farthest_points(_features(batch), kept)
    diversity.farthest_points(_features(batch), kept, start=_indices(batch, kept))
    diversity.largest_volume(_features(batch), kept)


def _received(batch: int, kept: int) -> None:
    q = _empty(batch, 577, 16, 64, dtype=HALF).transpose(1, 2)
    received_attention.received_attention(q, q, 0.125, None, None)
    received_attention.received_attention(q[:, :, 1:], q, 0.125, _empty(batch, 16, 576), None)


def _slots(batch: int, kept: int) -> None:
    weights = _folded_weights(1024, 2048, 512, 2048, HALF)
    start = SlotStart(
        slots=_empty(1, kept, 512),
        queries=_empty(1, kept, 512, dtype=HALF),
        query_bias=_empty(1, kept),
        gates_hidden=_empty(1, kept, 1536),
    )
    for images in (0, batch):  # a launch for each step, and all in one
        with loop.up_to(images):
            slot_attention.assign(_features(batch), start, weights, 3, 1e-5, False, False)


def _training(batch: int, kept: int) -> None:
    q, z = _empty(batch, kept, 512, dtype=HALF), _empty(batch, 576, 512, dtype=HALF)
    mean, mass, attention = slot_training.slot_update(q, z, z, 1e-5, True)
    slot_training.map_gradients(mean, attention, q, z, z, mean, mass, 1e-5)


def _loss(batch: int, kept: int) -> None:
    y, x = _empty(batch, 576, 1024, dtype=HALF), _features(batch)
    reconstruction.area_weighted_mse(y, x, _empty(batch, kept, 576), True, 0.5, 10.0)
    gradient = _empty(1).expand(batch)  # of a sum over images
    sums = gradient, y, x, _empty(batch, 576), _empty(batch)
    reconstruction.area_weighted_mse_backward(*sums, True, True)


#: By the public function, its launches: of how many images, with how many kept tokens.
CALLS: dict[str, Callable[[int, int], None]] = {
    "select_tokens": _select_tokens,
    "select_from_keys": _select_from_keys,
    "gather_tokens": _gather,
    "coverage": _coverage,
    "merge": _merge,
    "diversity": _diversity,
    "received_attention": _received,
    "top_tokens": _slots,
    "slot_update": _training,
    "area_weighted_mse": _loss,
}


def compiled(call: Callable[[int, int], None], batch: int, kept: int, arch: str) -> list[str]:
    """What the launches of a call are compiled for, with the tiles of ``arch``."""
    with pretend(arch), recording() as made:
        call(batch, kept)
    return [f"{one.kernel.fn.__name__} {kinds_of(one)} {dict(one.tile)}" for one in made]


def compiled_anew(arch: str, kept: int, batches: Sequence[int]) -> dict[str, list[str]]:
    """By call, what is compiled for some of ``batches`` that is not compiled for one image."""
    found = {}
    for name, call in CALLS.items():
        alone = compiled(call, 1, kept, arch)
        more = [one for batch in batches for one in compiled(call, batch, kept, arch)]
        found[name] = [*dict.fromkeys(one for one in more if one not in alone)]
    return found
