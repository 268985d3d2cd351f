"""Measures tiles on the GPU at hand and writes the table: ``python -m bench.tune [--write]``.

For every row of the table that this GPU's architecture uses: run the operation at the row's own shapes with
each candidate tile, check the result, time CUDA-graph replays, and take the candidate with the least mean
relative time if it beats the present tile by more than the noise. Compile what was chosen with ``python -m
bench.aot`` before committing it: a tile that suits one GPU must not spill on the others of its architecture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import ocvtp_kernels
from ocvtp_kernels import _tiles
from ocvtp_kernels._arch import architecture
from ocvtp_kernels._tiles import Tile
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.selection import gather_tokens, select_rows

Call = Callable[[], torch.Tensor]

#: A new tile must be this much faster, or the old one stays: two runs of one tile differ by about 2 %.
MARGIN = 1.03
_BATCHES = (1, 8, 64)

# What is worth trying, by kernel: the cross product of these, checked against registers by measuring.
_CANDIDATES: dict[str, dict[str, Sequence[int]]] = {
    "selection.top_parts": {"BN": (64, 128, 256), "BK": (8, 16, 32), "num_warps": (2, 4, 8)},
    "selection.select": {"BK": (1, 2, 4, 8), "BITS": (1, 2), "BR": (2, 4, 8), "num_warps": (4, 8, 16)},
    "selection.gather": {"BR": (1, 2, 4, 8), "BC": (256, 512, 1024), "num_warps": (2, 4, 8)},
    "selection.scatter": {"BN": (4, 8, 16), "BC": (128, 256, 512), "num_warps": (2, 4, 8)},
    "received_attention.row_lse": {
        "BM": (64, 128),
        "BN": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "received_attention.column_mean": {
        "BM": (32, 64, 128),
        "BN": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "received_attention.head_mean": {"BH": (8, 16), "BN": (64, 128, 256), "num_warps": (2, 4)},
}


def candidates(kernel: str, present: Tile) -> Iterator[Tile]:
    """Tiles to try, the present one first; options that a kernel's grid doesn't name stay as they are."""
    yield dict(present)
    grid = _CANDIDATES[kernel]
    for values in itertools.product(*grid.values()):
        tile = {**present, **dict(zip(grid, values, strict=True))}
        if tile != present:
            yield tile


@contextmanager
def replaced(kernel: str, arch: str, shape: str, tile: Tile) -> Iterator[None]:
    """Run with another tile in one row of the table."""
    table, key = _tiles.table(), (kernel, arch, shape)
    before = table[key]
    table[key] = tile
    try:
        yield
    finally:
        table[key] = before


def choose(times: Sequence[tuple[Tile, Sequence[float]]]) -> tuple[Tile, float]:
    """The best tile and its speed-up over the first, the present one.

    Args:
        times: each tile with one time for each workload, all in the same order.
    """
    present = times[0][1]

    def speedup(row: Sequence[float]) -> float:
        return math.exp(sum(math.log(a / b) for a, b in zip(present, row, strict=True)) / len(row))

    tile, gain = max(((tile, speedup(row)) for tile, row in times), key=lambda pair: pair[1])
    return (tile, gain) if gain > MARGIN else (times[0][0], 1.0)


def write(rows: Mapping[tuple[str, str, str], Tile], path: Path) -> None:
    """The table as JSON, one row a line."""
    lines = [
        json.dumps({"kernel": kernel, "arch": arch, "shape": shape, "tile": dict(tile)})
        for (kernel, arch, shape), tile in rows.items()
    ]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")


def workloads(kernel: str, shape: str, device: torch.device) -> list[Call]:
    """Calls that use this row of the table, on random data."""
    if kernel.startswith("selection"):
        return [_selection(kernel, shape, batch, device) for batch in _BATCHES]
    return [_received_attention(shape, batch, device) for batch in _BATCHES]


def _selection(kernel: str, shape: str, batch: int, device: torch.device) -> Call:
    tokens = int(shape.removeprefix("N<=")) if shape.startswith("N<=") else 576
    tokens = {256: 256, 1024: 576, 4096: 2880}.get(tokens, tokens)
    slots = 64 if kernel == "selection.select" and tokens <= 1024 else 160
    attention = torch.rand(batch, slots, tokens, device=device)
    fill = torch.rand(batch, tokens, device=device)
    x = torch.randn(batch, tokens, 1024, device=device, dtype=torch.float16)
    keep = min(slots, tokens)
    if kernel == "selection.gather":
        indices = torch.rand(batch, tokens, device=device).argsort(1)[:, :keep]
        return lambda: gather_tokens(x, indices, backend="triton")
    if kernel == "selection.scatter":
        indices = torch.rand(batch, tokens, device=device).argsort(1)[:, :keep]
        rows = x[:, :keep].contiguous()
        return lambda: torch.ops.ocvtp_kernels.scatter_tokens(rows, indices, tokens)
    return lambda: select_rows(attention, keep, fill, x, backend="triton")[2]


def _received_attention(shape: str, batch: int, device: torch.device) -> Call:
    if shape == "any":
        shape = "d64-16bit"
    width, bits = shape.removeprefix("d").removesuffix("bit").split("-")
    dtype = torch.float16 if bits == "16" else torch.float32
    tokens = 577 if width == "64" else 729
    qkv = torch.randn(batch, tokens, 2, 16, int(width), device=device, dtype=dtype)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    return lambda: received_attention(q, k, backend="triton")


def _time(call: Call) -> float:
    """Milliseconds, from CUDA-graph replays."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20, return_mode="median"))


def tune_row(
    kernel: str, arch: str, shape: str, calls: Sequence[Call], timer: Callable[[Call], float]
) -> tuple[Tile, float]:
    """The tile to use in one row, and its speed-up over the present one."""
    present = _tiles.tile(kernel, arch, shape)
    expected = [call() for call in calls]
    times: list[tuple[Tile, list[float]]] = []
    for tile in candidates(kernel, present):
        with replaced(kernel, arch, shape, tile):
            try:
                close = all(
                    torch.allclose(call(), want, rtol=1e-4, atol=0)
                    for call, want in zip(calls, expected, strict=True)
                )
                if not close:
                    raise SystemExit(f"{kernel} computes something else with {dict(tile)}: a bug")
                times.append((tile, [timer(call) for call in calls]))
            except Exception as error:
                if not times:  # the present tile must run
                    raise
                print(f"  {dict(tile)} can't run: {str(error).splitlines()[0][:80]}")
    return choose(times)


def _rows(arch: str, kernels: Iterable[str]) -> list[tuple[str, str]]:
    wanted = set(kernels)
    return [
        (kernel, shape)
        for kernel, owner, shape in _tiles.table()
        if owner == arch and (not wanted or kernel in wanted)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=sorted(_CANDIDATES), help="default: all")
    parser.add_argument("--write", action="store_true", help="write the table; default: only print")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    if arch is None:
        parser.error(
            f"add {torch.cuda.get_device_name(device)} to ocvtp_kernels/_arch.py, with rows to start from"
        )
    for kernel, shape in _rows(arch, options.kernel or []):
        tile, gain = tune_row(kernel, arch, shape, workloads(kernel, shape, device), _time)
        print(f"{kernel:32} {shape:10} {gain:5.2f}x {dict(tile)}", flush=True)
        _tiles.table()[kernel, arch, shape] = tile
        if options.write:  # row by row: a session may end at any time
            write(_tiles.table(), Path(ocvtp_kernels.__file__).with_name("tiles.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
