"""What L2 gives: the encoder's first product at two tiles, whose bytes differ by a third."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from bench.first.checks.bits import TILES
from bench.first.checks.setting import Setting
from bench.first.run import Finding
from bench.micro.slot_inputs import random_features, random_models
from bench.tune import SlotKernel, replaced
from ocvtp_kernels import _tiles
from ocvtp_kernels._arch import architecture, processors

_ROLE = "encode-1"


def traffic(setting: Setting) -> Iterator[Finding]:
    """Microseconds, and KB that a multiprocessor loaded in each of them: L2 gives at least that."""
    model = random_models(setting.widths, setting.slots, setting.device).mixed
    generator = torch.Generator(setting.device).manual_seed(0)
    x = random_features(setting.batch, setting.tokens, setting.widths.features, torch.float16, generator)
    arch = architecture(setting.device)
    rows = [key for key in _tiles.table() if key[1] == arch and key[2].startswith(_ROLE)]
    rows = [key for key in rows if key[2].endswith("16bit")]
    for rows_of_tile, columns, warps in TILES[_ROLE]:
        with contextlib.ExitStack() as stack:
            for key in rows:
                new = {**_tiles.table()[key], "BM": rows_of_tile, "BO": columns, "num_warps": warps}
                stack.enter_context(replaced(*key, new))
            kernel = SlotKernel("slot_attention.linear", rows[0][2], x, model, tf32=False)
            what = f"{_ROLE} at {rows_of_tile}x{columns}, B={setting.batch}"
            try:
                kernel.result()
                us = setting.graph_us([kernel])
            except Exception as error:
                yield {"what": what, "can't run": str(error).splitlines()[0][:80]}
                continue
        moved = _bytes(setting, rows_of_tile, columns)
        rate = moved / us / processors(setting.device) / 1e3
        yield {"what": what, "us": us, "MB from L2": moved / 1e6, "KB a us and multiprocessor": rate}


def _bytes(setting: Setting, rows: int, columns: int) -> int:
    """That all tiles load and store, in 16 bit."""
    total, width = setting.batch * setting.tokens, setting.widths
    tiles = math.ceil(total / rows) * math.ceil(width.hidden / columns)
    return 2 * (tiles * (rows + columns) * width.features + total * width.hidden)
