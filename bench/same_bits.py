"""Which tiles compute the same bits on the GPU at hand: ``python -m bench.same_bits [--write]``.

A pruner's result may not depend on the batch, so a kernel may be cut up otherwise for few or many rows, and
the slot loop run in one launch or in many, only where that changes no bit. Here whole calls of the pruner run
with each of a class's tiles, on the same data, and everything that any kernel wrote is compared, bit by bit.
What was found equal goes to ``ocvtp_kernels/same_bits.json``, which the launchers ask.

The interpreter can't tell: its products are a library's, whose bits depend on their sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ocvtp_kernels
from bench.harness import package_version, provenance
from bench.micro.slot_inputs import Folded, Widths, random_features, random_models
from bench.tune import replaced
from ocvtp_kernels import _tiles
from ocvtp_kernels._arch import architecture
from ocvtp_kernels._launch import Launch, launch, recording
from ocvtp_kernels._tiles import Tile
from ocvtp_kernels.slot_attention import TopTokens, loop, top_tokens

PATH = Path(ocvtp_kernels.__file__).with_name("same_bits.json")
#: Images in a call, tokens and slots of each: few rows and many, whole tiles and not.
SIZES = ((1, 576, 64), (5, 131, 50), (64, 576, 64), (2, 2880, 160))
_LOOP = "slot_attention.slot_loop"

Call = Callable[[], TopTokens]


class Found(NamedTuple):
    """One class of tiles."""

    kernel: str
    shape: str
    tiles: list[Tile]  # the class's own, and those that computed the same
    different: list[str]  # what did not, in words


def classes(arch: str) -> Iterator[tuple[str, str, list[Tile]]]:
    """Kernel, shape class and tiles, the class's own first, of every class of ``arch`` that has several."""
    for (kernel, of, shape), own in _tiles.table().items():
        others = [_tiles.table().get((kernel, arch, f"{shape}, {kind} rows")) for kind in ("few", "many")]
        tiles = [tile for tile in others if tile is not None]
        if of == arch and tiles:
            yield kernel, shape, [own, *tiles]


def calls(device: torch.device, widths: Widths, sizes: Sequence[tuple[int, int, int]]) -> list[Call]:
    """Whole calls of the pruner in float16 on random data."""

    def call(features: torch.Tensor, model: Folded) -> Call:
        start, weights = model
        return lambda: top_tokens(features, start, weights, backend="triton")

    made = []
    for batch, tokens, slots in sizes:
        generator = torch.Generator(device).manual_seed(batch)
        features = random_features(batch, tokens, widths.features, torch.float16, generator)
        made.append(call(features, random_models(widths, slots, device).mixed))
    return made


def compare(kernel: str, arch: str, shape: str, tiles: Sequence[Tile], made: Sequence[Call]) -> Found:
    """Run every call with each tile, the first of which is what the others are compared with."""
    equal, different = [tiles[0]], []
    for tile in tiles[1:]:
        try:
            wrong = [name for call in made for name in _differing(call, kernel, arch, shape, tiles[0], tile)]
        except Exception as error:  # a tile that can't run proves nothing, and the others still may
            wrong = [f"can't run: {str(error).splitlines()[0][:100]}"]
        if wrong:
            different.append(f"{dict(tile)}: {', '.join(dict.fromkeys(wrong))}")
        else:
            equal.append(tile)
    return Found(kernel, shape, equal, different)


def loop_differs(arch: str, tile: Tile, made: Sequence[Call]) -> list[str]:
    """What the loop in one launch, with ``tile``, finds otherwise than the launches."""
    wrong: list[str] = []
    shape = f"K<={loop.MAX_SLOTS}-16bit"
    for call in made:
        with loop.up_to(0):
            want = call()
        with replaced(_LOOP, arch, shape, tile), loop.up_to(10**6):
            got = call()
        wrong += [name for name in TopTokens._fields if not _same(getattr(got, name), getattr(want, name))]
    return list(dict.fromkeys(wrong))


def _differing(call: Call, kernel: str, arch: str, shape: str, own: Tile, tile: Tile) -> Iterator[str]:
    """Names of the arguments that hold other bits after a call with ``tile`` than with ``own``."""
    with loop.up_to(0):
        with replaced(kernel, arch, shape, own):
            want = _run(call)
        with replaced(kernel, arch, shape, tile):
            got = _run(call)
    for before, after in zip(want, got, strict=True):
        names = [p for p in after.kernel.arg_names if p.endswith("_ptr")]
        tensors = [[a for a in each.arguments if isinstance(a, torch.Tensor)] for each in (before, after)]
        for name, one, other in zip(names, *tensors, strict=True):
            if not _same(one, other):
                yield f"{after.kernel.fn.__name__}.{name.removesuffix('_ptr')}"


def _run(call: Call) -> list[Launch]:
    """The launches of a call, made one after another, with all that they wrote."""
    with recording() as launches:
        call()
    for each in launches:
        tensor = next(a for a in each.arguments if isinstance(a, torch.Tensor))
        launch(each.kernel, each.grid, tensor.device, *each.arguments, **each.tile)
    return launches


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def proof(found: Found, arch: str, where: dict[str, Any]) -> dict[str, Any]:
    """An entry of ``same_bits.json``; :mod:`ocvtp_kernels._tiles` says how it is read."""
    version = ".".join(str(package_version("triton")).split(".")[:2])
    return {
        "kernel": found.kernel,
        "arch": arch,
        "shape": found.shape,
        "triton": [version],
        "tiles": [dict(tile) for tile in found.tiles],
        "seen": where,
    }


def renewed(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``old`` proofs with ``new`` ones: of the same class and version these replace them."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["kernel"], one["arch"], one["shape"], tuple(one["triton"])

    replaced_keys = {key(one) for one in new}
    return [one for one in old if key(one) not in replaced_keys] + list(new)


def write(proofs: Sequence[dict[str, Any]], path: Path) -> None:
    """As JSON, one proof a line."""
    lines = [json.dumps(one) for one in proofs]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n" if lines else "[]\n")


def examine(
    arch: str, device: torch.device, widths: Widths, sizes: Sequence[tuple[int, int, int]]
) -> list[Found]:
    """Every class of ``arch`` on ``device``."""
    found = []
    made = calls(device, widths, sizes)
    few = calls(device, widths, [size for size in sizes if size[2] <= loop.MAX_SLOTS and size[0] < 8])
    for kernel, shape, tiles in classes(arch):
        if kernel != _LOOP:
            found.append(compare(kernel, arch, shape, tiles, made))
            continue
        wrong = [(tile, loop_differs(arch, tile, few)) for tile in tiles]
        found.append(
            Found(
                kernel,
                shape,
                [tile for tile, names in wrong if not names],
                [f"{dict(tile)}: {', '.join(names)}" for tile, names in wrong if names],
            )
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 where the loop's own tile computes other bits than launches."""
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew same_bits.json; default: only print")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("bits have to be seen on a GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    if arch is None:
        parser.error(f"no tiles were made for {torch.cuda.get_device_name(device)}")
    with torch.no_grad():
        found = examine(arch, device, Widths(), SIZES)
    whole = True
    for each in found:
        print(f"{each.kernel} {each.shape}: {len(each.tiles)} tiles compute the same bits")
        print(*(f"  other bits: {line}" for line in each.different), sep="\n")
        whole &= each.kernel != _LOOP or _tiles.tile(each.kernel, arch, each.shape) in each.tiles
    if not whole:
        print("THE LOOP IN ONE LAUNCH COMPUTES OTHER BITS THAN THE LAUNCHES: results depend on the batch")
    if options.write:
        where = {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "commit": provenance()["commit"],
        }
        proven = [proof(each, arch, where) for each in found if len(each.tiles) > 1]
        write(renewed(_tiles.proofs(), proven), PATH)
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
