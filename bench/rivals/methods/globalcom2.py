"""GlobalCom2, from class-token logits of a thumbnail and of tiles."""

from __future__ import annotations

import torch

from bench.rivals.golden import Case
from ocvtp import methods

_SIDE = 24


def check(case: Case) -> None:
    """``globalcom2_odd``."""
    (columns, rows), (width, height) = (
        case.params["tiles_width_height"],
        case.params["image_size_width_height"],
    )
    found = methods.globalcom2(
        case["base_scores"],
        case["crop_scores"],
        case.params["ratio"],
        shape=(rows, columns),
        size=(height, width),
    )
    case.same("base_kept", found.thumbnail)
    case.close("scales", found.shares)
    counts = torch.bincount(found.tile[found.tile >= 0], minlength=rows * columns)
    case.equal("kept_per_tile", counts.tolist(), case.params["kept_per_tile"])
    case.equal("newlines", int((found.tile == -1).sum()), case.params["newlines"])
    if case.fixed or "fixed" in case.params["expect"]:
        # Which tokens are kept is official, their lines are not: by true place, a newline after every line.
        tile, place = _by_true_place(case["crop_tile"], case["crop_place"], columns, rows * _SIDE)
        case.equal("tiles by true place", found.tile.tolist(), tile)
        case.equal("places by true place", found.place.tolist(), place)
    else:
        case.same("crop_tile", found.tile)
        case.same("crop_place", found.place)


def _by_true_place(
    tile: torch.Tensor, place: torch.Tensor, columns: int, lines: int
) -> tuple[list[int], list[int]]:
    of_line: list[list[tuple[int, int]]] = [[] for _ in range(lines)]
    for t, p in zip(tile.tolist(), place.tolist(), strict=True):
        if t >= 0:
            of_line[t // columns * _SIDE + p // _SIDE].append((t, p))
    rows = [row for line in of_line for row in [*sorted(line), (-1, -1)]]
    return [t for t, _ in rows], [p for _, p in rows]
