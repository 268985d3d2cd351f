"""The tile table: how each kernel is cut up, by (kernel, architecture, shape class).

``tiles.json`` is written by ``python -m bench.tune`` on a GPU, and every row of it is compiled by
``python -m bench.aot``. Nothing is tuned in a user's call.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files

Tile = Mapping[str, int]

_PACKAGE = __name__.rpartition(".")[0]  # from a kernel hub, it has another name


@functools.cache
def table() -> dict[tuple[str, str, str], Tile]:
    """``(kernel, architecture, shape class)`` -> constexpr arguments, ``num_warps``, ``num_stages``."""
    rows = json.loads(files(_PACKAGE).joinpath("tiles.json").read_text())
    return {(row["kernel"], row["arch"], row["shape"]): row["tile"] for row in rows}


def tile(kernel: str, arch: str, shape: str) -> Tile:
    """One row of the table.

    Raises:
        KeyError: the table has no such row, which the tests exclude for what a launcher can ask for.
    """
    return table()[kernel, arch, shape]
