"""Every kernel launch that the launchers can make, up to sizes that don't change the compiled code."""

from __future__ import annotations

import functools

import torch

from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import Launch, recording
from ocvtp_kernels.received_attention import triton as received_attention
from ocvtp_kernels.selection import triton as selection

_HALF = (torch.float16, torch.bfloat16)


@functools.cache
def launches(arch: str) -> list[Launch]:
    """One launch for each kernel variant, with the tiles of ``arch``; tensors are on ``meta``."""
    with pretend(arch), recording() as recorded:
        _selection()
        _received_attention()
    unique: dict[str, Launch] = {}
    for launch in recorded:
        arguments = [a.dtype if isinstance(a, torch.Tensor) else a for a in launch.arguments]
        unique.setdefault(f"{launch.kernel.fn.__name__} {arguments} {launch.tile}", launch)
    return list(unique.values())


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _selection() -> None:
    # (slots, tokens): a map that one program scans, and one that is cut up, in every size class.
    sizes = ((16, 144), (300, 256), (64, 576), (192, 576), (16, 2880), (160, 2880), (4, 8192), (64, 8000))
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
        for dtype in (*_HALF, torch.float32):
            # As a projection leaves them, [B, N, H, d]; odd strides only cost vector loads.
            q = _empty(2, 577, 16, head_dim, dtype=dtype).transpose(1, 2)
            received_attention.received_attention(q, q, 0.125, None, None)
    q = _empty(1, 4000, 16, 64, dtype=torch.float16).transpose(1, 2)
    for head_dim, dtype, segments in (
        (64, torch.float16, 60),
        (80, torch.bfloat16, 4000),
        (128, torch.float32, 60),
    ):
        q = _empty(1, 4000, 16, head_dim, dtype=dtype).transpose(1, 2)
        bounds = _empty(segments + 1, dtype=torch.int32)
        received_attention.received_attention(q, q, 0.125, None, bounds)
