"""Panels: a photograph with something drawn on it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ocvtp.visualize.colours import FILL_COLOUR, INK, PAPER, PICK_COLOUR, assign_colours
from ocvtp.visualize.grid import (
    attention_of,
    box,
    draw_borders,
    grow,
    line_width,
    slot_picks,
    spread,
    tokens_of,
)

# How much of a dropped patch's brightness is left, and how strongly a colour covers the photograph.
_DIM = 0.30
_TINT = 0.62


def kept_panel(
    image: Image.Image,
    kept: npt.ArrayLike,
    grid: tuple[int, int],
    picks: npt.ArrayLike | None = None,
    scale: int = 1,
) -> Image.Image:
    """The photograph with its dropped patches dimmed and every kept one framed.

    Args:
        image: the picture as the model sees it; its sides are multiples of the grid's.
        kept: ``[keep]`` token indices in ``[0, h * w)``, row-major over the grid.
        grid: ``(h, w)`` patches.
        picks: token indices that were some slot's top token; their frames take ``PICK_COLOUR`` and
            the others' ``FILL_COLOUR``. ``None`` frames all alike.
        scale: enlarge by this whole factor first.

    Returns:
        RGB, ``scale`` times the size of ``image``. Inside its frame a kept patch is unchanged.

    Raises:
        ValueError: a grid that does not divide the image, an index outside it or given twice, a
            ``scale`` below 1.
    """
    grown, patch = grow(image, grid, scale)
    tokens = tokens_of("kept", kept, grid)
    from_slot = set(tokens.tolist() if picks is None else np.asarray(picks).ravel().tolist())
    keep_mask = np.zeros(grid, dtype=bool)
    keep_mask.flat[tokens] = True
    pixels = np.asarray(grown, dtype=np.float64)
    dimmed = _DIM * (0.5 * pixels + 0.5 * _grey(pixels))
    shown = np.where(spread(keep_mask, patch)[..., None], pixels, dimmed)
    panel = Image.fromarray(np.rint(shown).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    line = line_width(patch)
    for token in tokens.tolist():
        colour = PICK_COLOUR if token in from_slot else FILL_COLOUR
        draw.rectangle(box(token, grid, patch), outline=colour, width=line)
    return panel


def slot_panel(
    image: Image.Image,
    slot_attention: npt.ArrayLike,
    grid: tuple[int, int],
    kept: npt.ArrayLike | None = None,
    scale: int = 1,
) -> Image.Image:
    """The photograph coloured by the slot that attends to each patch most.

    Slots that touch get colours that differ strongly; a line separates them.

    Args:
        image: the picture as the model sees it; its sides are multiples of the grid's.
        slot_attention: ``[K, N]``, ``N = h * w`` tokens row-major over the grid.
        grid: ``(h, w)`` patches.
        kept: token indices; those that are some slot's top token get a dot.
        scale: enlarge by this whole factor first.

    Returns:
        RGB, ``scale`` times the size of ``image``.

    Raises:
        ValueError: shapes that do not fit the grid, or an index outside it or given twice.
    """
    grown, patch = grow(image, grid, scale)
    attention = attention_of(slot_attention, grid)
    owner = np.argmax(attention, axis=0).reshape(grid)
    panel = tinted(grown, owner, assign_colours(owner), patch)
    draw = ImageDraw.Draw(panel)
    if kept is not None:
        tops = set(slot_picks(attention).tolist())
        radius = max(1.0, min(patch) / 6)
        for token in tokens_of("kept", kept, grid).tolist():
            if token in tops:
                left, top, right, bottom = box(token, grid, patch)
                x, y = (left + right) / 2, (top + bottom) / 2
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), PAPER, INK, 1)
    return panel


def tinted(
    grown: Image.Image,
    owner: npt.NDArray[np.int64],
    colours: npt.NDArray[np.float64],
    patch: tuple[int, int],
) -> Image.Image:
    """A picture in grey under the colour of each number in ``owner`` ``[h, w]``, with lines between them."""
    grey = _grey(np.asarray(grown, dtype=np.float64))
    tint = np.asarray(spread(colours[owner], patch), dtype=np.float64)
    # The photograph modulates the colour's brightness, so objects stay recognisable under it.
    shown = _TINT * tint * (0.55 + 0.45 * grey / 255) + (1 - _TINT) * grey
    panel = Image.fromarray(np.clip(np.rint(shown), 0, 255).astype(np.uint8))
    draw_borders(ImageDraw.Draw(panel), owner, patch, max(1, line_width(patch) // 2))
    return panel


def _grey(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
