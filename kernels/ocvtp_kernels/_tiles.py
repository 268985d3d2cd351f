"""The tile table: how each kernel is cut up, by (kernel, architecture, shape class).

``tiles.json`` is written by ``python -m bench.tune`` on a GPU, and every row of it is compiled by
``python -m bench.aot``. Nothing is tuned in a user's call.

A shape class may have two rows more, ``"..., few rows"`` and ``"..., many rows"``, for a kernel whose work
grows with the batch. A result may not depend on the batch, so they count only where a GPU has shown that
these tiles compute the same bits: ``same_bits.json``, written by ``python -m bench.same_bits``, for the
versions of Triton named there. Elsewhere one tile serves all.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

Tile = Mapping[str, int]

#: Fewer rows than this are few: with tiles for more, most of a GPU idles.
FEW_ROWS = 1024
#: So many rows are many: wide tiles fill a GPU and read less.
MANY_ROWS = 4096

_trusted = False


@functools.cache
def table() -> dict[tuple[str, str, str], Tile]:
    """``(kernel, architecture, shape class)`` -> constexpr arguments, ``num_warps``, ``num_stages``."""
    return {(row["kernel"], row["arch"], row["shape"]): row["tile"] for row in _read("tiles.json")}


def tile(kernel: str, arch: str, shape: str) -> Tile:
    """One row of the table.

    Raises:
        KeyError: the table has no such row, which the tests exclude for what a launcher can ask for.
    """
    return table()[kernel, arch, shape]


def tile_of_rows(kernel: str, arch: str, shape: str, rows: int) -> Tile:
    """The row for so many rows of work, if its bits are those of the class's own row; else that one.

    Raises:
        KeyError: as :func:`tile`.
    """
    own = tile(kernel, arch, shape)
    kind = "few rows" if rows < FEW_ROWS else "many rows" if rows >= MANY_ROWS else None
    other = table().get((kernel, arch, f"{shape}, {kind}")) if kind else None
    if other is None or not (_trusted or _same_bits(kernel, arch, shape, own, other)):
        return own
    return other


@functools.cache
def proofs() -> list[dict[str, Any]]:
    """What ``same_bits.json`` holds: kernel, architecture, shape class, tiles of the same bits, and where and
    with which versions of Triton that was seen."""
    return list(_read("same_bits.json"))


@contextlib.contextmanager
def trusting_bits() -> Iterator[None]:
    """Take tiles by number of rows without a proof: to compile them, to predict, and to look for one."""
    global _trusted
    before, _trusted = _trusted, True
    try:
        yield
    finally:
        _trusted = before


def _same_bits(kernel: str, arch: str, shape: str, own: Tile, other: Tile) -> bool:
    return any(
        (proof["kernel"], proof["arch"], proof["shape"]) == (kernel, arch, shape)
        and _triton() in proof["triton"]
        and own in proof["tiles"]
        and other in proof["tiles"]
        for proof in proofs()
    )


@functools.cache
def _triton() -> str:
    """Major and minor version: a new one may choose other layouts."""
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return ""


def _read(name: str) -> Any:
    return json.loads(files("ocvtp_kernels").joinpath(name).read_text())
