"""For whom kept patches stand: regions of one colour, and on each kept patch how many it stands for."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ocvtp.visualize.colours import INK, PAPER, assign_colours
from ocvtp.visualize.fonts import font
from ocvtp.visualize.grid import box, grow, line_width, owners_of, tokens_of
from ocvtp.visualize.panels import tinted

_SMALLEST_TEXT = 8
_PALE = 0.75  # how much white is in the colour under a number


def mass_panel(
    image: Image.Image,
    kept: npt.ArrayLike,
    owner: npt.ArrayLike,
    grid: tuple[int, int],
    scale: int = 1,
) -> Image.Image:
    """The photograph coloured by the kept patch that stands for each.

    A kept patch that stands for others is pale, and says for how many, itself among them: by a number, or
    where patches are too small for that, by a disc whose area is in proportion to it. One that stands for
    itself alone has a white frame.

    Args:
        image: the picture as the model sees it; its sides are multiples of the grid's.
        kept: ``[keep]`` token indices in ``[0, h * w)``, row-major over the grid.
        owner: ``[h * w]``, position among ``kept`` of the one that stands for each: a row of
            ``Selection.owner``.
        grid: ``(h, w)`` patches.
        scale: enlarge by this whole factor first.

    Returns:
        RGB, ``scale`` times the size of ``image``.

    Raises:
        ValueError: shapes that do not fit the grid, an index outside it or given twice, owners that are not
            among the kept, or a kept token that does not stand for itself.
    """
    grown, patch = grow(image, grid, scale)
    tokens = tokens_of("kept", kept, grid)
    owners = owners_of(owner, tokens, grid)
    mass = np.bincount(owners)
    colours = assign_colours(owners.reshape(grid))
    panel = tinted(grown, owners.reshape(grid), colours, patch)
    draw = ImageDraw.Draw(panel)
    size = text_size(int(mass.max()), patch)
    line = max(1, line_width(patch) // 2)
    for token, count, colour in zip(tokens.tolist(), mass.tolist(), colours, strict=True):
        around = box(token, grid, patch)
        if count == 1:
            draw.rectangle(around, outline=PAPER, width=line)
            continue
        red, green, blue = (round(255 * _PALE + (1 - _PALE) * float(part)) for part in colour)
        draw.rectangle(around, (red, green, blue), INK, line)
        x, y = (around[0] + around[2] + 1) / 2, (around[1] + around[3] + 1) / 2
        if size is not None:
            draw.text((x, y), str(count), INK, font(size), anchor="mm")
        else:
            radius = max(1.0, (min(patch) / 2 - line) * math.sqrt(count / mass.max()))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), INK)
    return panel


def text_size(most: int, patch: tuple[int, int]) -> float | None:
    """Of numbers up to ``most`` in a patch of this height and width; ``None`` if they would be too small."""
    digits = font(100).getbbox("0" * len(str(most)))
    size = 100 * min(0.86 * patch[1] / (digits[2] - digits[0]), 0.62 * patch[0] / (digits[3] - digits[1]))
    return size if size >= _SMALLEST_TEXT else None
