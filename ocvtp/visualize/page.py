"""The page: panels side by side, with titles and legends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ocvtp.visualize.colours import FAINT, FILL_COLOUR, INK, PAPER, PICK_COLOUR, Colour
from ocvtp.visualize.fonts import font
from ocvtp.visualize.grid import attention_of, owners_of, slot_picks, tokens_of
from ocvtp.visualize.mass import mass_panel, text_size
from ocvtp.visualize.panels import kept_panel, slot_panel

# Panels are enlarged by a whole factor until their longer side is about this many pixels.
_PANEL_SIDE = 672


def overlay(
    image: Image.Image,
    kept: npt.ArrayLike,
    slot_attention: npt.ArrayLike | None,
    grid: tuple[int, int],
    *,
    owner: npt.ArrayLike | None = None,
    note: str | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Panels side by side with a legend: what one image keeps, who stands for whom, and what its slots own.

    The first shows kept patches as they are, the others dimmed; frames tell tokens that some slot picked from
    those that filled the budget. With ``owner``, the next colours each patch by the kept one that stands for
    it, and says how many that are. With ``slot_attention``, the last colours each patch by its slot
    (largest attention), as Figure 4 of the paper does.

    Args:
        image: the picture as the model sees it (see :func:`unnormalize`), sides multiples of the grid's.
        kept: ``[keep]`` token indices of this image: a row of ``Selection.indices``.
        slot_attention: ``[K, N]`` of this image: one element of ``Selection.slot_attention``; ``None`` where
            nobody has slots.
        grid: ``(h, w)`` patches, ``h * w == N``, row-major.
        owner: ``[N]``, position among ``kept`` of the one that stands for each: a row of ``Selection.owner``;
            ``None`` where kept tokens stand for nobody else.
        note: a line printed under the legend.
        scale: whole enlargement of all panels; ``None`` makes their longer side about 672 pixels.

    Returns:
        An RGB image.

    Raises:
        ValueError: shapes or indices that do not fit together.
    """
    if scale is None:
        scale = max(1, round(_PANEL_SIDE / max(image.size)))
    tokens = tokens_of("kept", kept, grid)
    attention = None if slot_attention is None else attention_of(slot_attention, grid)
    shown = [_kept(image, tokens, attention, grid, scale)]
    if owner is not None:
        shown.append(_mass(image, tokens, owners_of(owner, tokens, grid), grid, scale))
    if attention is not None:
        shown.append(_slots(image, tokens, attention, grid, scale))
    return _page(shown, note)


@dataclass(frozen=True)
class _Shown:
    """A panel with its words: a title, and what colours of frames mean (``None``: words alone)."""

    panel: Image.Image
    title: str
    legend: tuple[tuple[Colour | None, str], ...]


def _kept(
    image: Image.Image,
    tokens: npt.NDArray[np.int64],
    attention: npt.NDArray[np.float64] | None,
    grid: tuple[int, int],
    scale: int,
) -> _Shown:
    title = f"kept: {len(tokens)} of {grid[0] * grid[1]} patches"
    if attention is None:
        return _Shown(kept_panel(image, tokens, grid, None, scale), title, ((PICK_COLOUR, "kept"),))
    picks = np.intersect1d(slot_picks(attention), tokens)
    legend = (
        (PICK_COLOUR, f"a slot's top patch ({len(picks)})"),
        (FILL_COLOUR, f"fill ({len(tokens) - len(picks)})"),
    )
    return _Shown(kept_panel(image, tokens, grid, picks, scale), title, legend)


def _mass(
    image: Image.Image,
    tokens: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    grid: tuple[int, int],
    scale: int,
) -> _Shown:
    mass = np.bincount(owner)
    least, most = int(mass.min()), int(mass.max())
    width, height = image.size
    written = text_size(most, (scale * height // grid[0], scale * width // grid[1])) is not None
    what = "number" if written else f"area of its dot (largest: {most})"
    words = f"one colour per kept patch; {what}: patches it stands for"
    if least == 1:
        words = "white frame: kept" if most == 1 else f"{words}; white frame: 1"
    title = f"each kept patch stands for {most if least == most else f'{least} to {most}'}"
    return _Shown(mass_panel(image, tokens, owner, grid, scale), title, ((None, words),))


def _slots(
    image: Image.Image,
    tokens: npt.NDArray[np.int64],
    attention: npt.NDArray[np.float64],
    grid: tuple[int, int],
    scale: int,
) -> _Shown:
    owners = len(np.unique(np.argmax(attention, axis=0)))
    return _Shown(
        slot_panel(image, attention, grid, tokens, scale),
        f"slots: {owners} of {len(attention)} own a patch",
        ((None, "one colour per slot; dot: the patch kept for it"),),
    )


def _page(shown: list[_Shown], note: str | None) -> Image.Image:
    width, height = shown[0].panel.size
    text = max(11, min(20, width // 38))
    margin = text + text // 2
    title, small = font(text + 2), font(text)
    row = text + text // 2
    top = margin + row + text // 3
    below = margin // 2 + row * (3 if note else 2)
    count = len(shown)
    page = Image.new("RGB", (count * width + (count + 1) * margin, top + height + below + margin // 2), PAPER)
    draw = ImageDraw.Draw(page)
    y = top + height + margin // 2
    for number, one in enumerate(shown):
        x = margin + number * (width + margin)
        page.paste(one.panel, (x, top))
        draw.text((x, margin), one.title, INK, title)
        at = float(x)
        for colour, words in one.legend:
            if colour is not None:
                draw.rectangle((at, y + 2, at + text, y + 2 + text), outline=colour, width=max(2, text // 5))
                at += 1.5 * text
            draw.text((at, y), words, INK, small)
            at += draw.textlength(words, small) + 1.5 * text
    if note:
        draw.text((margin, y + row + text // 3), note, FAINT, small)
    return page
