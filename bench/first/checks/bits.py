"""Whether a change that should change no bit changes none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch

from bench import same_bits
from bench.first.checks.setting import Setting
from bench.first.run import Finding
from bench.micro.slot_inputs import Folded, random_features, random_models
from bench.tune import replaced
from ocvtp_kernels import _tiles
from ocvtp_kernels._arch import architecture
from ocvtp_kernels.slot_attention import TopTokens, loop, top_tokens

Way = Callable[[], AbstractContextManager[object]]

#: Tiles of a product that may give the same bits, by its row of the table: rows, columns, warps.
TILES = {
    "encode-2": ((64, 16, 4), (64, 64, 4), (128, 64, 8), (128, 256, 8)),
    "encode-1": ((128, 128, 8), (128, 256, 8)),
}


def ways() -> Mapping[str, Way]:
    """Ways in which the launcher can run the loop: name -> a context manager in which it takes that way."""
    return {
        "a launch for each step": functools.partial(loop.up_to, 0),
        "one launch": functools.partial(loop.up_to, 1024),
    }


def bits(setting: Setting) -> Iterator[Finding]:
    """Of whole calls in float16: each slot's best token, each token's largest attention."""
    model = random_models(setting.widths, setting.slots, setting.device).mixed
    generator = torch.Generator(setting.device).manual_seed(0)
    x = random_features(setting.batch, setting.tokens, setting.widths.features, torch.float16, generator)
    yield from _of_tiles(x[:1], model, setting)
    yield from _of_classes(setting)
    yield from _of_ways(x, model)
    yield from _of_batch(x, model)


def _of_tiles(x: torch.Tensor, model: Folded, setting: Setting) -> Iterator[Finding]:
    arch = architecture(setting.device)
    for name, tiles in TILES.items():
        rows = [key for key in _tiles.table() if key[1] == arch and key[2].startswith(name)]
        rows = [key for key in rows if key[2].endswith("16bit")]
        if not rows:
            yield {"what": f"tiles of {name}", "rows in the table": 0}
        results: dict[str, TopTokens] = {}
        for row, columns, warps in tiles:
            tile = f"{row}x{columns}"
            with contextlib.ExitStack() as stack:
                for key in rows:
                    new = {**_tiles.table()[key], "BM": row, "BO": columns, "num_warps": warps}
                    stack.enter_context(replaced(*key, new))
                try:
                    results[tile] = _run(x, model)
                except Exception as error:
                    yield {"what": f"tile {tile} of {name}", "can't run": str(error).splitlines()[0][:80]}
        if results:
            first, *others = results.items()
            for tile, got in others:
                yield {"what": f"{name}, {tile} against {first[0]}", "same bits": _same(got, first[1])}


def _of_classes(setting: Setting) -> Iterator[Finding]:
    """Of every class with tiles by number of rows; ``python -m bench.same_bits --write`` keeps it."""
    arch = architecture(setting.device)
    assert arch is not None
    sizes = ((1, setting.tokens, setting.slots), (setting.batch, setting.tokens, setting.slots))
    for found in same_bits.examine(arch, setting.device, setting.widths, sizes):
        what = f"{found.kernel} {found.shape}"
        line: Finding = {"what": what, "tiles of the same bits": len(found.tiles)}
        yield line | ({"other bits": "; ".join(found.different)} if found.different else {})


def _of_ways(x: torch.Tensor, model: Folded) -> Iterator[Finding]:
    for images in (1, len(x)):
        results = {}
        for name, way in ways().items():
            with way():
                results[name] = _run(x[:images], model)
        first, *others = results.items()
        if not others:
            yield {"what": f"B={images}, ways to run the loop", "found": len(results)}
        for name, got in others:
            yield {"what": f"B={images}, loop: {name} against {first[0]}", "same bits": _same(got, first[1])}


def _of_batch(x: torch.Tensor, model: Folded) -> Iterator[Finding]:
    together = _run(x, model)
    last = len(x) - 1
    for image in dict.fromkeys((0, last)):
        alone = _run(x[image : image + 1], model)
        in_batch = TopTokens(*(tensor[image : image + 1] for tensor in together))
        what = f"image {image} alone and in a batch of {len(x)}"
        yield {"what": what, "same bits": _same(alone, in_batch)}


def _run(x: torch.Tensor, model: Folded) -> TopTokens:
    return top_tokens(x, *model, backend="triton")


def _same(got: TopTokens, want: TopTokens) -> bool:
    """Their best tokens and largest attention. Which tiles hold the best of a slot may differ in number."""
    keys = [found.keys.amax(dim=1) for found in (got, want)]
    return torch.equal(*keys) and torch.equal(got.largest, want.largest)
