"""What every kernel launch needs, and a way to look at launches without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ocvtp_kernels._arch import has_dependent_launches

#: Of a grid's second and third dimension, where launchers put images.
MAX_IMAGES = 65535
# Triton's default changes with 3.10, and results with it: said here, so that bits don't depend on versions.
OPTIONS = {"enable_fp_fusion": True}


# For kernels with a constexpr PDL, where it is true.
_PDL_OPTIONS = {"launch_pdl": True}


class Phase(NamedTuple):
    """Tasks of a launch that wait for all of the phase before: how many programs do one each."""

    name: str
    tasks: int


class Launch(NamedTuple):
    """One kernel launch: run-time arguments in order, and constexprs, warps and stages by name.

    ``phases``: of a launch whose programs draw tasks by an atomic ticket and wait for each other, what the
    tasks are, in the order of their tickets.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    tile: Mapping[str, Any]
    phases: tuple[Phase, ...] = ()


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: Sequence[int], device: torch.device, *arguments: Any, **tile: Any) -> None:
    """Run ``kernel`` on ``device``, which need not be the current one; ``tile`` holds its constexprs.

    A kernel with a constexpr ``PDL`` (:func:`ocvtp_kernels._jit.after_launches_before`) gets it from here.
    """
    launch_in_phases((), kernel, grid, device, *arguments, **tile)


def launch_in_phases(
    phases: Sequence[Phase],
    kernel: Any,
    grid: Sequence[int],
    device: torch.device,
    *arguments: Any,
    **tile: Any,
) -> None:
    """As :func:`launch`. ``phases`` are noted for whoever records launches, and change nothing."""
    if "PDL" in kernel.arg_names:
        tile["PDL"] = has_dependent_launches(device)
    if _recorded is not None:
        _recorded.append(Launch(kernel, tuple(grid), arguments, tile, tuple(phases)))
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **tile, **options(tile))


def options(tile: Mapping[str, Any]) -> dict[str, bool]:
    """Of the compiler and the launch, for a kernel with such constexprs."""
    return OPTIONS | (_PDL_OPTIONS if tile.get("PDL") else {})


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of running them, so that tensors may be on ``meta``; outputs stay unwritten."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def why_no_kernel(x: torch.Tensor) -> str | None:
    """Why kernels of up to 32 bits, a row of programs for each image, can't take ``x`` ``[B, ...]``."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    if x.shape[0] > MAX_IMAGES:
        return f"it takes up to {MAX_IMAGES} images; got {x.shape[0]}"
    return None
