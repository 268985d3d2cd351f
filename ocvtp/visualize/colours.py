"""Colours far from each other, and whose neighbours have others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]

PICK_COLOUR: Colour = (255, 176, 0)
FILL_COLOUR: Colour = (64, 196, 255)
PAPER: Colour = (255, 255, 255)
INK: Colour = (24, 24, 27)
FAINT: Colour = (113, 113, 122)


def palette(count: int) -> npt.NDArray[np.uint8]:
    """``count`` colours, each as far as possible (CIELAB) from those before it: ``[count, 3]`` sRGB.

    Very dark and very pale colours are left out, so that every one stays visible on a photograph.

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    levels = np.linspace(0, 255, 14)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 35) & (lab[:, 0] < 92) & (chroma > 28)
    candidates, lab = candidates[usable], lab[usable]
    chosen = [int(np.argmax(np.hypot(lab[:, 1], lab[:, 2])))]
    distance = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    while len(chosen) < count:
        # With more colours asked for than there are candidates they repeat, farthest first.
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        if not distance.any():
            distance = np.linalg.norm(lab - lab[chosen[-1]], axis=1)
    return candidates[chosen].astype(np.uint8)


def assign_colours(owner: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A colour for every slot number in ``owner`` ``[h, w]``: ``[max + 1, 3]``.

    Largest slots choose first; each takes the free colour farthest from those of its neighbours.
    """
    present, sizes = np.unique(owner, return_counts=True)
    colours = palette(len(present)).astype(np.float64)
    lab = _lab(colours)
    neighbours: dict[int, set[int]] = {int(slot): set() for slot in present}
    for one, other in ((owner[:, 1:], owner[:, :-1]), (owner[1:], owner[:-1])):
        differ = one != other
        for a, b in zip(one[differ].tolist(), other[differ].tolist(), strict=True):
            neighbours[a].add(b)
            neighbours[b].add(a)
    free = list(range(len(present)))
    taken: dict[int, int] = {}
    for slot in present[np.argsort(-sizes, kind="stable")].tolist():
        around = [taken[other] for other in neighbours[slot] if other in taken]
        best = free[0]
        if around:
            gaps = np.linalg.norm(lab[free][:, None] - lab[around][None], axis=-1).min(axis=1)
            best = free[int(np.argmax(gaps))]
        taken[slot] = best
        free.remove(best)
    table = np.zeros((int(present.max()) + 1, 3))
    for slot, index in taken.items():
        table[slot] = colours[index]
    return table


def _lab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sRGB ``[..., 3]`` in 0..255 to CIELAB under D65."""
    unit = rgb / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1
    )
