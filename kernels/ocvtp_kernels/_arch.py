"""What a device can run: its architecture's name in the tile table, or the reason why it can't."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch

#: CUDA compute capability -> rows of the tile table. 8.6, 8.9 and 12.x share 99 KB of shared memory a block
#: and ``mma.sync``; 10.0 and 10.3 share 227 KB and ``tcgen05``.
_CUDA = {
    (8, 0): "sm80",
    (8, 6): "sm86",
    (8, 7): "sm80",
    (8, 9): "sm86",
    (9, 0): "sm90",
    (10, 0): "sm100",
    (10, 3): "sm100",
    (12, 0): "sm86",
    (12, 1): "sm86",
}
_HIP = ("gfx942",)
_DEPENDENT_LAUNCHES = ("sm90", "sm100")
#: Whose tiles the interpreter runs: those of the GPU that this project is tuned on.
_INTERPRETED = "sm90"
_PROCESSORS = 132

_pretended: str | None = None


@functools.cache
def has_triton() -> bool:
    """Whether ``import triton`` would work."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # blocked: sys.modules["triton"] is None
        return False


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were first imported)."""
    if not has_triton():
        return False
    from triton.runtime import JITFunction

    from ocvtp_kernels._jit import ordered_bits

    return not isinstance(ordered_bits, JITFunction)


def architecture(device: torch.device) -> str | None:
    """The tile table's name for ``device``; ``None`` if no tiles were made for it."""
    if _pretended is not None:
        return _pretended
    if interpreting():
        return _INTERPRETED
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in _HIP else None
    return _CUDA.get(torch.cuda.get_device_capability(device))


def why_no_kernels(device: torch.device) -> str | None:
    """The reason why no Triton kernel can run on ``device``, or ``None`` if kernels can."""
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if interpreting() and device.type == "cpu":
        return None
    if _pretended is not None and device.type == "meta":
        return None
    if device.type != "cuda":
        debug = " (TRITON_INTERPRET=1 runs them there, slowly, to debug)" if device.type == "cpu" else ""
        return f"kernels need a CUDA or ROCm GPU, not {device.type}{debug}"
    if architecture(device) is None:
        return f"no tiles were made for {torch.cuda.get_device_name(device)}; run python -m bench.tune on it"
    return None


@functools.cache
def _can_depend() -> bool:
    from triton.language.extra import cuda

    return hasattr(cuda, "gdc_wait")


def has_dependent_launches(device: torch.device) -> bool:
    """Whether a kernel can be put in place while the one before still runs (programmatic dependent launch):
    CUDA from compute capability 9.0 on, with a Triton that knows of it."""
    if interpreting() or not has_triton():
        return False
    return architecture(device) in _DEPENDENT_LAUNCHES and _can_depend()


def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``; where there is no GPU, those of an H100."""
    if device.type != "cuda" or _pretended is not None:
        return _PROCESSORS
    return _count(device.index)


@functools.cache
def _count(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@contextlib.contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Take the tiles of another architecture: to compile for it, or to run its tiles in the interpreter.

    Tensors on ``meta`` count as lying on such a GPU: ``backend="auto"`` is Triton for them.
    """
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = before
