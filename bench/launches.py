"""Every kernel launch that the launchers can make, up to sizes that don't change the compiled code."""

from __future__ import annotations

import functools

import torch

from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import Launch, recording
from ocvtp_kernels.received_attention import triton as received_attention
from ocvtp_kernels.selection import triton as selection


@functools.cache
def launches(arch: str) -> list[Launch]:
    """One launch for each kernel variant, with the tiles of ``arch``; tensors are on ``meta``."""
    with pretend(arch), recording() as recorded:
        _selection()
        _received_attention()
    unique: dict[str, Launch] = {}
    for launch in recorded:
        unique.setdefault(f"{launch.kernel.fn.__name__} {_kinds(launch)} {launch.tile}", launch)
    return list(unique.values())


def _kinds(launch: Launch) -> list[object]:
    """What Triton specialises on: dtypes, and whether integers are 64 bits wide, 1, or multiples of 16."""
    parameters = [p for p in launch.kernel.params if not p.is_constexpr]
    kinds: list[object] = []
    for parameter, value in zip(parameters, launch.arguments, strict=True):
        if isinstance(value, torch.Tensor):
            kinds.append(value.dtype)
        elif isinstance(value, int):
            wide = value >= 2**31
            kinds.append((wide,) if parameter.do_not_specialize else (wide, value == 1, value % 16 == 0))
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
