"""Where the kernels run in these tests, and helpers that make life hard for them.

Without a GPU that is Triton's interpreter, which tests/conftest.py switches on: a fraction of a millisecond
for each operation on a block, so sizes are small. On a GPU the very same tests run compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from ocvtp_kernels._tiles import Tile, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU"))
interpreter_only = pytest.mark.skipif(ON_GPU, reason="a GPU runs the tiles of its own architecture")

#: How far apart on a GPU two float32 results may be whose sums ran in another order: what :func:`within`
#: allows each of them, where PyTorch's are a rounding or two from exact ones.
IN_ANOTHER_ORDER = 4 * 2.0**-22 + 1e-6
# Of :func:`within` on a GPU.
_TIMES, _FLOOR = 4.0, 1e-6

_GUARD = 1024  # elements; keeps any alignment


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


def within(error_of_pytorch: float, floor: float, times: float = 2.0) -> float:
    """How far from exact a float32 result may be, where PyTorch's is ``error_of_pytorch`` away.

    ``times`` of that and a ``floor`` in the interpreter, whose products are numpy's. A GPU's are three of
    TF32, which its tensor cores add up by cutting bits off, always towards zero, while PyTorch's are rounded:
    there it is four times, and 1e-6.
    """
    tight = times * error_of_pytorch + floor
    return max(tight, _TIMES * error_of_pytorch + _FLOOR) if ON_GPU else tight


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_bits(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaNs with payloads too: for kernels that copy."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).to(DEVICE, dtype)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8).view(dtype).to(DEVICE)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """To compare what may hold NaN."""
    return tensor.contiguous().view(torch.uint8)


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As kernels store it: to nearest, but the interpreter cuts bits off on the way to bfloat16."""
    if dtype == torch.bfloat16 and not ON_GPU:
        return (tensor.float().view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
    return tensor.to(dtype)


#: Tiles of _nearest.py, for :func:`coarse_tiles`.
NEAREST = {
    "nearest.token_mean": {"BN": 32, "BC": 16},
    "nearest.centre": {"BN": 32, "BC": 16},
    "nearest.assign": {"BM": 32, "BK": 16, "BC": 16},
}


def coarse_tiles(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, sizes: Mapping[str, Tile]
) -> None:
    """Few big steps where the interpreter runs, but more than one of each.

    Not for a test that takes the fixture ``real_tiles`` (tests/kernels/conftest.py).

    Args:
        monkeypatch: of the test.
        request: of the test.
        sizes: what to change, by kernel, as the table calls it.
    """
    if ON_GPU or "real_tiles" in request.fixturenames:
        return
    for key, tile in list(table().items()):
        if key[0] in sizes:
            monkeypatch.setitem(table(), key, {**tile, **sizes[key[0]]})


def on_device(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def _poison(dtype: torch.dtype) -> Any:
    if dtype.is_complex:
        return complex("nan+nanj")
    if dtype.is_floating_point:
        return float("nan")
    return dtype == torch.bool or torch.iinfo(dtype).min or 171


def surrounded(tensor: torch.Tensor, pad: int = 1) -> torch.Tensor:
    """The same values as a view into storage that holds poison on all sides of every dimension."""
    size = [length + 2 * pad for length in tensor.shape]
    storage = torch.full(size, _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = storage[tuple(slice(pad, pad + length) for length in tensor.shape)]
    return view.copy_(tensor)


def far_apart(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values with more than 2**31 elements between the ends of ``axis``, which has five entries.

    Memory is only reserved: pages are touched where values lie.
    """
    assert tensor.shape[axis] == 5
    stride = 2**29 + 16
    strides, inner = [0] * tensor.ndim, 1
    for dim in reversed(range(tensor.ndim)):
        if dim != axis:
            strides[dim], inner = inner, inner * tensor.shape[dim]
    strides[axis] = stride
    assert inner < stride
    assert 4 * stride > 2**31
    try:
        storage = torch.empty(4 * stride + inner, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError as error:
        pytest.skip(f"can't reserve {4 * stride * tensor.itemsize >> 30} GiB: {error}")
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


class PoisonedTorch:
    """``torch`` as a launcher sees it: what ``empty`` returns holds poison and lies between two guards."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        length = torch.Size(shape).numel()
        buffer = torch.full((length + 2 * _GUARD,), _poison(dtype), dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[_GUARD : _GUARD + length].view(shape)

    def assert_guards_intact(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            fresh = torch.full((_GUARD,), _poison(buffer.dtype), dtype=buffer.dtype, device=buffer.device)
            assert torch.equal(bits(buffer[:_GUARD]), bits(fresh))
            assert torch.equal(bits(buffer[-_GUARD:]), bits(fresh))
