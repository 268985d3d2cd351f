"""Every kernel launch that the launchers can make, up to sizes that don't change the compiled code."""

from __future__ import annotations

import contextlib
import functools

import torch

from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import Launch, recording
from ocvtp_kernels._tiles import trusting_bits
from ocvtp_kernels.coverage import triton as coverage
from ocvtp_kernels.diversity import triton as diversity
from ocvtp_kernels.merge import triton as merge
from ocvtp_kernels.received_attention import triton as received_attention
from ocvtp_kernels.reconstruction import triton as reconstruction
from ocvtp_kernels.selection import triton as selection
from ocvtp_kernels.slot_attention import FoldedWeights, SlotStart, loop
from ocvtp_kernels.slot_attention import triton as slot_attention
from ocvtp_kernels.slot_attention.training import triton as slot_training


@functools.cache
def launches(arch: str) -> list[Launch]:
    """One launch for each kernel variant, with the tiles of ``arch``; tensors are on ``meta``."""
    with pretend(arch), recording() as recorded:
        _selection()
        _received_attention()
        _reconstruction()
        _slot_attention()
        _slot_training()
        _coverage()
        _merge()
        _diversity()
    unique: dict[str, Launch] = {}
    for launch in recorded:
        unique.setdefault(f"{launch.kernel.fn.__name__} {kinds_of(launch)} {launch.tile}", launch)
    return list(unique.values())


def kinds_of(launch: Launch) -> dict[str, str]:
    """By parameter, what Triton specialises on: types, and whether integers are 1 or multiples of 16."""
    parameters = [p for p in launch.kernel.params if not p.is_constexpr]
    kinds = {}
    for parameter, value in zip(parameters, launch.arguments, strict=True):
        if isinstance(value, torch.Tensor):
            kinds[parameter.name] = str(value.dtype).removeprefix("torch.")
        elif isinstance(value, int):
            wide = "i64" if value >= 2**31 else "i32"
            special = not parameter.do_not_specialize
            one, sixteen = special and value == 1, special and value % 16 == 0
            kinds[parameter.name] = "1" if one else f"16*{wide}" if sixteen else wide
    return kinds


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _selection() -> None:
    # (slots, tokens): a map that one program scans, and one that is cut up, in every size class.
    sizes = ((16, 144), (300, 256), (64, 576), (192, 576), (16, 2880), (160, 2880))
    for slots, tokens in sizes:
        for dtype in (torch.float32, torch.float16):
            attention = _empty(2, slots, tokens, dtype=dtype)
            fill, rows = _empty(2, tokens), _empty(2, tokens, 1024, dtype=torch.float16)
            selection.select_tokens(attention, 64, fill, rows)
            selection.select_tokens(attention, 64, None, None)
        keys = _empty(2, 9, slots, dtype=torch.int64)
        selection.select_from_keys(keys, 64, fill, rows)
        selection.select_from_keys(keys, 64, fill, None)
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        rows = _empty(2, 576, 1024, dtype=dtype)
        selection.gather_tokens(rows, _empty(2, 64, dtype=torch.int64))
        selection.gather_tokens(rows.mT, _empty(2, 64, dtype=torch.int64))
        if dtype.is_floating_point:
            selection.scatter_tokens(rows, _empty(2, 64, dtype=torch.int64), 577)


def _received_attention() -> None:
    for head_dim in (64, 72, 80, 96, 128):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            # As a projection leaves them, [B, N, H, d], and with strides that allow no wide loads.
            q = _empty(2, 577, 16, head_dim, dtype=dtype).transpose(1, 2)
            received_attention.received_attention(q, q, 0.125, None, None)
            if dtype != torch.bfloat16 and head_dim != 72:
                ragged = _empty(2, 577, 16, head_dim + 1, dtype=dtype)[..., 1:].transpose(1, 2)
                received_attention.received_attention(ragged, ragged, 0.125, None, None)
                for segments in (60, 4000):
                    bounds = _empty(segments + 1, dtype=torch.int32)
                    received_attention.received_attention(q[:1], q[:1], 0.125, None, bounds)


def _reconstruction() -> None:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for slots, tokens in ((64, 576), (640, 2880)):  # one program for an image, and many
        # (reconstruction, features, map): alike, under autocast, and features as they are stored.
        for y, x, map_ in ((half,) * 3, (single,) * 3, (brain, single, single), (brain, half, single)):
            _reconstructed(slots, tokens, 1024, y, x, map_)
            if y == map_:  # sizes that allow no wide loads, too
                _reconstructed(slots + 1, tokens + 1, 1025, y, x, map_)
    _reconstructed(1, 1, 1, single, single, single)


def _reconstructed(
    slots: int, tokens: int, width: int, y: torch.dtype, x: torch.dtype, map_: torch.dtype
) -> None:
    pair = _empty(2, tokens, width, dtype=y), _empty(2, tokens, width, dtype=x)
    attention = _empty(2, slots, tokens, dtype=map_)
    sums = _empty(1).expand(2), *pair, _empty(2, tokens), _empty(2)
    reconstruction.area_weighted_mse(*pair, attention, True, 0.5, 10.0)
    reconstruction.area_weighted_mse_backward(*sums, True, False)
    if y == map_:
        reconstruction.area_weighted_mse(*pair, attention.mT.contiguous().mT, False, 0.5, 10.0)
        reconstruction.area_weighted_mse_backward(*sums, True, True)
        reconstruction.area_weighted_mse_backward(*sums, False, True)


def _slot_attention() -> None:
    # Official widths. Slots: each class of attend and update, alone in a tile and in chunks.
    for operands, tf32 in ((torch.float16, False), (torch.float32, False), (torch.float32, True)):
        weights = _folded_weights(1024, 2048, 512, 2048, operands)
        # TF32 takes fewer registers than three products of it in the same tile, so one class tells enough.
        for slots in (64,) if tf32 else (64, 128, 192, 640):
            start = SlotStart(
                slots=_empty(1, slots, 512),
                queries=_empty(1, slots, 512, dtype=operands),
                query_bias=_empty(1, slots),
                gates_hidden=_empty(1, slots, 1536),
            )
            for features in (torch.float16, torch.bfloat16, torch.float32) if slots == 64 else (operands,):
                for return_attention in (False, True):
                    x = _empty(2, 577, 1024, dtype=features)[:, 1:]
                    with loop.up_to(0):
                        slot_attention.assign(x, start, weights, 3, 1e-5, tf32, return_attention)
            if slots != 64 or operands != torch.float16:
                continue
            # In one launch; and by number of rows, where bits allow that: few, many.
            for batch, tokens, looped in ((1, 576, 4), (1, 576, 0), (64, 576, 0)):
                for trust in (False, True):
                    with loop.up_to(looped), trusting_bits() if trust else contextlib.nullcontext():
                        x = _empty(batch, tokens, 1024, dtype=torch.float16)
                        slot_attention.assign(x, start, weights, 3, 1e-5, tf32, False)


def _slot_training() -> None:
    # Slots: each class of either pass; with and without a gradient of the map.
    for operands in (torch.float16, torch.bfloat16, torch.float32):
        for slots in (64, 128, 192, 640):
            q, z = _empty(2, slots, 512, dtype=operands), _empty(2, 577, 512, dtype=operands)
            mean, mass, attention = slot_training.slot_update(q, z, z, 1e-5, True)
            for grad_map in (None, attention):
                slot_training.map_gradients(mean, grad_map, q, z, z, mean, mass, 1e-5)


def _folded_weights(width: int, hidden: int, slot: int, mlp: int, dtype: torch.dtype) -> FoldedWeights:
    return FoldedWeights(
        encoder_fc1_weight=_empty(hidden, width, dtype=dtype),
        encoder_fc1_bias=_empty(hidden),
        encoder_fc2_weight=_empty(slot, hidden, dtype=dtype),
        encoder_fc2_bias=_empty(slot),
        query_weight=_empty(slot, slot, dtype=dtype),
        query_bias_weight=_empty(slot),
        gru_input_weight=_empty(3 * slot, slot, dtype=dtype),
        gru_input_bias=_empty(3 * slot),
        gru_mass_bias=_empty(3 * slot),
        gru_hidden_weight=_empty(3 * slot, slot, dtype=dtype),
        gru_hidden_bias=_empty(3 * slot),
        mlp_fc1_weight=_empty(mlp, slot, dtype=dtype),
        mlp_fc1_bias=_empty(mlp),
        mlp_fc2_weight=_empty(slot, mlp, dtype=dtype),
        mlp_fc2_bias=_empty(slot),
    )


def _coverage() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for kept in (64, 160) if dtype == torch.float32 else (64,):
            x = _empty(2, 577, 1024, dtype=dtype)[:, 1:]
            coverage.coverage(x, _empty(2, kept, dtype=torch.int64), 1)
    # Columns that allow no wide loads.
    coverage.coverage(_empty(2, 577, 1001), _empty(2, 64, dtype=torch.int64), 1)


def _merge() -> None:
    owner, mass = _empty(2, 576, dtype=torch.int64), _empty(2, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = _empty(2, 577, 1024, dtype=dtype)[:, 1:]
        for kept in (64, 160) if dtype == torch.float32 else (64,):
            indices = _empty(2, kept, dtype=torch.int64)
            for mask in (None, _empty(2, kept, dtype=torch.bool)):
                merge.nearest_kept(x, indices, mask)
        # As they are, and where there are no wide loads: columns apart; a gradient that is one number.
        for tokens in (x, x.mT.contiguous().mT):
            merge.merge_by(tokens, owner, 64)
        for rows in (_empty(2, 64, 1024, dtype=dtype), _empty(1, 1, 1, dtype=dtype).expand(2, 64, 1024)):
            merge.spread_rows(rows, owner, mass)
    ragged = _empty(2, 576, 1001)
    merge.nearest_kept(ragged, _empty(2, 64, dtype=torch.int64), None)
    merge.spread_rows(merge.merge_by(ragged, owner, 64)[0], owner, mass)


def _diversity() -> None:
    # Rows of one block and of several. One program for an image and one for each tile run the same code.
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for width in (384, 1024, 1152):
            for choose in (diversity.farthest_points, diversity.largest_volume):
                choose(_empty(2, 577, width, dtype=dtype)[:, 1:], 64)
