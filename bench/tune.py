"""Measures tiles on the GPU at hand and writes the table: ``python -m bench.tune [--write]``.

For every row of the table that this GPU's architecture uses: run the operation at the row's own shapes with
each candidate tile, check the result, time CUDA-graph replays, and take the candidate with the least mean
relative time if it beats the present tile by more than the noise. Of Slot Attention's kernels only the one
concerned is timed: a whole call runs before, with the candidate, to be checked and to leave real inputs.
Compile what was chosen with ``python -m bench.aot`` before committing it: a tile that suits one GPU must not
spill on the others of its architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import ocvtp_kernels
from bench.micro.slot_inputs import Folded, Models, Widths, random_features, random_models
from ocvtp_kernels import _tiles
from ocvtp_kernels._arch import architecture
from ocvtp_kernels._launch import Launch, launch, recording
from ocvtp_kernels._tiles import Tile
from ocvtp_kernels.diversity import farthest_points, largest_volume
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.reconstruction import area_weighted_mse
from ocvtp_kernels.selection import gather_tokens, select_rows
from ocvtp_kernels.slot_attention import TopTokens, loop, top_tokens

Call = Callable[[], torch.Tensor]

#: A new tile must be this much faster, or the old one stays: two runs of one tile differ by about 2 %.
MARGIN = 1.03
_BATCHES = (1, 8, 64)
# Images that the loop in one launch is for, and those that make many rows of 64 slots.
_LOOPED = 4
_MANY = 64

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
    "nearest.token_mean": {"BN": (16, 32, 64), "BC": (32, 64, 128), "num_warps": (2, 4, 8)},
    "nearest.centre": {"BN": (4, 8, 16), "BC": (128, 256, 512), "num_warps": (2, 4, 8)},
    "nearest.assign": {
        "BM": (32, 64),
        "BK": (32, 64, 128),
        "BC": (16, 32),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "coverage.means": {
        "BT": (32, 64),
        "BN": (16, 32, 64),
        "BC": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "coverage.away": {"BM": (4, 8, 16), "BC": (128, 256, 512), "num_warps": (2, 4, 8)},
    "coverage.choose": {"BT": (4, 8, 16), "BN": (64, 128, 256), "num_warps": (2, 4, 8)},
    "coverage.accept": {"BN": (256, 512, 1024), "num_warps": (2, 4, 8)},
    "coverage.finish": {"BN": (256, 512, 1024), "num_warps": (2, 4, 8)},
    "merge.line_up": {"BT": (4, 8, 16), "BN": (128, 256, 512), "num_warps": (2, 4, 8)},
    "merge.average": {"BN": (4, 8, 16), "BC": (256, 512, 1024), "num_warps": (1, 2, 4)},
    "merge.spread": {"BN": (4, 8, 16), "BC": (128, 256, 512), "num_warps": (2, 4, 8)},
    "diversity.statistics": {"BN": (16, 32, 64), "BC": (32, 64, 128), "num_warps": (2, 4, 8)},
    "diversity.farthest": {
        "BM": (8, 16, 32),
        "BC": (512, 1024),
        "num_warps": (8, 16),
        "num_stages": (2, 3, 4),
    },
    "diversity.units": {"BM": (4, 8, 16), "BC": (128, 256, 512), "num_warps": (2, 4, 8)},
    "diversity.volume": {
        "BM": (8, 16, 32),
        "BC": (512, 1024),
        "num_warps": (8, 16),
        "num_stages": (2, 3, 4),
    },
    "reconstruction.token_errors": {
        "BN": (8, 16, 32),
        "BK": (32, 64),
        "BC": (128, 256, 512),
        "num_warps": (4, 8),
    },
    "reconstruction.token_weights": {"BN": (32, 64, 128), "BK": (32, 64, 128), "num_warps": (4, 8)},
    "reconstruction.total_loss": {"BT": (32, 64, 128), "num_warps": (1, 2, 4)},
    "reconstruction.gradients": {"BN": (4, 8, 16, 32), "BC": (128, 256, 512), "num_warps": (2, 4, 8)},
    "slot_attention.normalise": {"SIZE": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)},
    # Below 64 rows there is no wgmma, but at B=1 there are more programs.
    "slot_attention.linear": {
        "BM": (32, 64, 128),
        "BO": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    "slot_attention.attend": {
        "BM": (32, 64, 128),
        "BK": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "slot_attention.update": {
        "BK": (64, 128),
        "BD": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "slot_attention.slot_loop": {
        "BD": (32, 64),
        "BJ": (16, 32),
        "BO1": (32, 64),
        "BO2": (16, 32),
        "num_stages": (2, 3),
    },
    "slot_training.prepare": {"BR": (1, 2, 4, 8), "BC": (256, 512), "num_warps": (2, 4, 8)},
    "slot_training.attend_backward": {
        "BM": (32, 64, 128),
        "BK": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "slot_attention.gru": {
        "BM": (32, 64, 128),
        "BJ": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
}
# Of slot_attention.linear: role -> whose weights it multiplies by.
_ROLES = {
    "encode-1": "encoder_fc1_weight",
    "encode-2": "encoder_fc2_weight",
    "mlp-1": "mlp_fc1_weight",
    "mlp-2": "mlp_fc2_weight",
    "queries": "query_weight",
}
# (slots, tokens, most images) that reach a row, by the slots in its name; rows without take the first.
_SLOT_SIZES = {
    "K<=64": (64, 576, 64),
    "K<=128": (128, 576, 64),
    "K<=256": (192, 576, 64),
    "any K": (640, 2880, 8),
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
    if kernel.startswith("slot_attention"):
        return list(_slot_attention(kernel, shape, device))
    if kernel.startswith("selection"):
        return [_selection(kernel, shape, batch, device) for batch in _BATCHES]
    if kernel.startswith("slot_training"):
        return [_slot_training(shape, batch, device) for batch in _BATCHES[:2]]
    if kernel.startswith(("coverage", "nearest")):
        return [_coverage(shape, batch, device) for batch in _BATCHES[:2]]
    if kernel.startswith("merge"):
        return [_merge(kernel, batch, device) for batch in _BATCHES]
    if kernel.startswith("diversity"):  # one program an image; a launch for each step
        return [_diversity(kernel, *size, device) for size in ((1, 576), (8, 576), (1, 2880))]
    if kernel.startswith("reconstruction"):
        return [_reconstruction(kernel, shape, batch, device) for batch in _BATCHES[:2]]
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


def _reconstruction(kernel: str, shape: str, batch: int, device: torch.device) -> Call:
    """At the sizes of one training image: cut up, or, where one program weighs it, the smaller."""
    slots, tokens = (64, 576) if shape == "whole" else (640, 2880)
    y, x = (torch.randn(batch, tokens, 1024, device=device, dtype=torch.float16) for _ in range(2))
    attention = (3 * torch.randn(batch, slots, tokens, device=device)).softmax(dim=1)
    if kernel == "reconstruction.gradients":
        weights, total = torch.rand(batch, tokens, device=device), torch.rand(batch, device=device) + 1
        arguments = total, y, x, weights, total, True, False
        return lambda: torch.ops.ocvtp_kernels.area_weighted_mse_backward(*arguments)[0]
    return lambda: area_weighted_mse(y, x, attention, reduction="none", backend="triton")


def _coverage(shape: str, batch: int, device: torch.device) -> Call:
    """One round, to the error it ends at: near ties may be decided either way."""
    tokens, keep = (2880, 160) if shape == "any T" else (576, 64)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 1024, generator=draw).to(device)
    indices = torch.rand(batch, tokens, generator=draw).argsort(dim=1)[:, :keep].to(device)
    return lambda: torch.ops.ocvtp_kernels.coverage(x, indices, 1)[1]


def _merge(kernel: str, batch: int, device: torch.device) -> Call:
    """Owners of very different size, as those of an image are: half of all tokens have the first."""
    tokens, keep = 576, 64
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 1024, generator=draw).to(device, torch.float16)
    owner = torch.randint(-keep, keep, (batch, tokens), generator=draw).clamp(min=0).to(device)
    if kernel == "merge.spread":
        rows, mass = torch.ops.ocvtp_kernels.merge_by(x, owner, keep)
        return lambda: torch.ops.ocvtp_kernels.spread_rows(rows, owner, mass)
    return lambda: torch.ops.ocvtp_kernels.merge_by(x, owner, keep)[0]


def _diversity(kernel: str, batch: int, tokens: int, device: torch.device) -> Call:
    """Choices that rounding doesn't decide: in float64 each best is 2e-5 of it, or more, ahead of the second.

    With a mean of 0 all volumes would be near 1.
    """
    x = torch.randn(batch, tokens, 1024, generator=torch.Generator().manual_seed(0)).to(device) + 1.0
    choose = largest_volume if kernel in ("diversity.units", "diversity.volume") else farthest_points
    return lambda: choose(x, 16, ascending=False, backend="triton")


def _slot_training(shape: str, batch: int, device: torch.device) -> Call:
    """One step and its gradients, to bfloat16 or float32; norms, as no tile makes tiny elements alike."""
    name = shape.rsplit("-", 1)[0]
    slots, tokens, _ = _SLOT_SIZES.get(name, _SLOT_SIZES["K<=64"])
    half = shape.endswith("16bit")
    dtype = torch.float32 if not half else torch.bfloat16 if device.type == "cuda" else torch.float16
    sizes = ((batch, slots, 512), (batch, tokens, 512), (batch, tokens, 512), (batch, slots, 512))
    queries, keys, values, grad = (torch.randn(size, device=device) for size in sizes)
    queries, keys, values = (t.to(dtype) for t in (queries / 8, keys, values))
    mean, mass = torch.randn(batch, slots, 512, device=device), torch.rand(batch, slots, device=device) + 1
    arguments = grad, None, queries, keys, values, mean, mass, 1e-5

    def call() -> torch.Tensor:
        gradients = torch.ops.ocvtp_kernels.slot_update_backward(*arguments)
        return torch.stack([gradient.float().norm() for gradient in gradients])

    return call


class SlotKernel:
    """One kernel of Slot Attention, on what a whole call leaves it to read.

    Attributes:
        rtol: by how much results of two tiles may differ. Sums run in another order; where a sum is then
            rounded to 16 bits, or to TF32 by the next product, it may end up as its neighbour. In the
            interpreter, at (N, K) = (300, 32), tiles differed by up to 6e-3 in 16 bit and 4e-6 in 32 bit.
    """

    def __init__(self, kernel: str, shape: str, features: torch.Tensor, model: Folded, tf32: bool) -> None:
        start, weights = model
        self._row = kernel, shape
        self._device = features.device
        self._whole = functools.partial(top_tokens, features, start, weights, backend="triton", tf32=tf32)
        # A tile for few or many rows counts only where its bits are trusted, and it is the one wanted.
        self._bits = _tiles.trusting_bits if _kind(shape) else contextlib.nullcontext
        role = next((role for role in _ROLES if shape.startswith(role)), None)
        self._weight = None if role is None else getattr(weights, _ROLES[role]).data_ptr()
        self._own: list[Launch] = []
        self._tile: Tile = {}
        self.rtol = 1e-4 if weights.query_weight.dtype == torch.float32 and not tf32 else 5e-2

    def result(self) -> torch.Tensor:
        """Of a whole call, with the tile in the table: attention of each slot's pick, each token's largest.

        Which tokens are picked is not compared: near ties may be decided either way.
        """
        self._own.clear()  # memory of the last tile's
        found, launches = self._recorded()
        for each in launches:
            self._run(each)
        return torch.cat([(found.keys.amax(dim=1) >> 32).int().view(torch.float32), found.largest], dim=1)

    def __call__(self) -> torch.Tensor:
        """The launches of this kernel alone; returns something that the last of them reads or writes."""
        if self._tile != self._present():
            self._recorded()
        for each in self._own:
            self._run(each)
        return self._own[-1].arguments[0]

    def _recorded(self) -> tuple[TopTokens, list[Launch]]:
        with self._bits(), loop.up_to(_LOOPED if self._is_loop else 0), recording() as launches:
            found = self._whole()
        self._own = [each for each in launches if self._is_own(each)]
        if self._is_loop:  # with the launch before it, which sets its counters to zero
            self._own = launches[launches.index(self._own[0]) - 1 :]
        self._tile = self._present()
        return found, launches

    @property
    def _is_loop(self) -> bool:
        return self._row[0] == "slot_attention.slot_loop"

    def _present(self) -> Tile:
        kernel, shape = self._row
        arch = architecture(self._device)
        assert arch is not None
        return _tiles.tile(kernel, arch, shape)

    def _is_own(self, each: Launch) -> bool:
        if each.kernel.fn.__name__ != self._row[0].split(".")[1]:
            return False
        return self._weight is None or each.arguments[1].data_ptr() == self._weight

    def _run(self, each: Launch) -> None:
        launch(each.kernel, each.grid, self._device, *each.arguments, **each.tile)


def _slot_attention(kernel: str, shape: str, device: torch.device) -> Iterator[SlotKernel]:
    """One image and many, and for float32 weights products of both kinds, which share their tiles."""
    sizes = [size for name, size in _SLOT_SIZES.items() if shape.startswith(name)]
    kind = _kind(shape)
    slots, tokens, most = (sizes or [_SLOT_SIZES["K<=64"]])[0]
    if kernel == "slot_attention.update" and shape.startswith("any K"):  # there, more than 64
        slots, tokens, most = _SLOT_SIZES["K<=256"]
    models = _models(slots, device)
    batches: tuple[int, ...] = (_BATCHES[0], min(_BATCHES[-1], most))
    if kernel == "slot_attention.slot_loop":
        batches = (1, _LOOPED)
    elif kind:
        batches = (1,) if kind == "few rows" else (_MANY,)
    for batch in dict.fromkeys(batches):
        generator = torch.Generator(device).manual_seed(0)
        features = random_features(batch, tokens, Widths().features, torch.float16, generator)
        if "32bit" in shape:
            yield SlotKernel(kernel, shape, features, models.folded, tf32=False)
            yield SlotKernel(kernel, shape, features, models.folded, tf32=True)
        else:
            yield SlotKernel(kernel, shape, features, models.mixed, tf32=False)


def _kind(shape: str) -> str:
    """``"few rows"``, ``"many rows"`` or nothing."""
    return shape.partition(", ")[2]


@functools.lru_cache(maxsize=4)
def _models(slots: int, device: torch.device) -> Models:
    return random_models(Widths(), slots, device)


def _time(call: Call) -> float:
    """Milliseconds, from CUDA-graph replays."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20, return_mode="median"))


def tune_row(
    kernel: str, arch: str, shape: str, calls: Sequence[Call], timer: Callable[[Call], float]
) -> tuple[Tile, float]:
    """The tile to use in one row, and its speed-up over the present one."""
    present = _tiles.tile(kernel, arch, shape)
    expected = [_result(call) for call in calls]
    times: list[tuple[Tile, list[float]]] = []
    for tile in candidates(kernel, present):
        with replaced(kernel, arch, shape, tile):
            try:
                close = all(
                    torch.allclose(_result(call), want, rtol=_tolerance(call), atol=0)
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


def _result(call: Call) -> torch.Tensor:
    return call.result() if isinstance(call, SlotKernel) else call()


def _tolerance(call: Call) -> float:
    return call.rtol if isinstance(call, SlotKernel) else 1e-4


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
        print(f"{kernel:32} {shape:14} {gain:5.2f}x {dict(tile)}", flush=True)
        _tiles.table()[kernel, arch, shape] = tile
        if options.write:  # row by row: a session may end at any time
            write(_tiles.table(), Path(ocvtp_kernels.__file__).with_name("tiles.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
