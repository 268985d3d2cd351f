"""What a pruner kept of a photograph, and which slot each patch belongs to, as a picture.

Needs pillow and numpy only; tensors on the CPU are welcome wherever an array is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = ["kept_panel", "overlay", "palette", "slot_panel", "slot_picks", "unnormalize"]

Colour = tuple[int, int, int]

PICK_COLOUR: Colour = (255, 176, 0)
FILL_COLOUR: Colour = (64, 196, 255)
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (24, 24, 27)
_FAINT: Colour = (113, 113, 122)

# How much of a dropped patch's brightness is left, and how strongly a slot's colour covers the photograph.
_DIM = 0.30
_TINT = 0.62
# Panels are enlarged by a whole factor until their longer side is about this many pixels.
_PANEL_SIDE = 672


def unnormalize(
    pixel_values: npt.ArrayLike, mean: Sequence[float], std: Sequence[float], rescale: float = 1 / 255
) -> Image.Image:
    """The picture behind an image processor's output: exactly the pixels the model's patches cut up.

    Args:
        pixel_values: ``[3, H, W]`` floating point, ``(pixel * rescale - mean) / std``.
        mean: three channel means.
        std: three channel deviations.
        rescale: the processor's ``rescale_factor``.

    Returns:
        An RGB image of ``W x H`` pixels.

    Raises:
        ValueError: a shape or a number of channels that does not fit, or a ``std`` or ``rescale`` of 0.
    """
    values = np.asarray(pixel_values, dtype=np.float64)
    if values.ndim != 3 or values.shape[0] != 3 or 0 in values.shape:
        raise ValueError(f"pixel_values must be [3, H, W]; got shape {list(values.shape)}")
    if len(mean) != 3 or len(std) != 3 or not all(std) or not rescale:
        raise ValueError(
            f"mean and std must be three numbers each, std and rescale not 0; got {mean}, {std}, {rescale}"
        )
    pixels = values.transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    return Image.fromarray(np.clip(np.rint(pixels / rescale), 0, 255).astype(np.uint8))


def slot_picks(slot_attention: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Each slot's top token, ties to the lower index: ``[K, N]`` -> ``[K]`` int64."""
    return np.argmax(_attention(slot_attention), axis=1)


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
    grown, patch = _grow(image, grid, scale)
    tokens = _tokens("kept", kept, grid)
    from_slot = set(tokens.tolist() if picks is None else np.asarray(picks).ravel().tolist())
    keep_mask = np.zeros(grid, dtype=bool)
    keep_mask.flat[tokens] = True
    pixels = np.asarray(grown, dtype=np.float64)
    dimmed = _DIM * (0.5 * pixels + 0.5 * _grey(pixels))
    shown = np.where(_spread(keep_mask, patch)[..., None], pixels, dimmed)
    panel = Image.fromarray(np.rint(shown).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    line = _line_width(patch)
    for token in tokens.tolist():
        colour = PICK_COLOUR if token in from_slot else FILL_COLOUR
        draw.rectangle(_box(token, grid, patch), outline=colour, width=line)
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
    grown, patch = _grow(image, grid, scale)
    attention = _attention(slot_attention, grid)
    owner = np.argmax(attention, axis=0).reshape(grid)
    colours = _assign_colours(owner)
    grey = _grey(np.asarray(grown, dtype=np.float64))
    tint = np.asarray(_spread(colours[owner], patch), dtype=np.float64)
    # The photograph modulates the colour's brightness, so objects stay recognisable under it.
    shown = _TINT * tint * (0.55 + 0.45 * grey / 255) + (1 - _TINT) * grey
    panel = Image.fromarray(np.clip(np.rint(shown), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    _draw_borders(draw, owner, patch, max(1, _line_width(patch) // 2))
    if kept is not None:
        tops = set(slot_picks(attention).tolist())
        radius = max(1.0, min(patch) / 6)
        for token in _tokens("kept", kept, grid).tolist():
            if token in tops:
                left, top, right, bottom = _box(token, grid, patch)
                x, y = (left + right) / 2, (top + bottom) / 2
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), _PAPER, _INK, 1)
    return panel


def overlay(
    image: Image.Image,
    kept: npt.ArrayLike,
    slot_attention: npt.ArrayLike,
    grid: tuple[int, int],
    *,
    note: str | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Two panels side by side with a legend: what one image keeps, and what its slots own.

    The left panel shows kept patches as they are, the others dimmed; frames tell tokens that some
    slot picked from those that filled the budget. The right panel colours each patch by its slot
    (largest attention), as Figure 4 of the paper does.

    Args:
        image: the picture as the model sees it (see :func:`unnormalize`), sides multiples of the grid's.
        kept: ``[keep]`` token indices of this image: a row of ``Selection.indices``.
        slot_attention: ``[K, N]`` of this image: one element of ``Selection.slot_attention``.
        grid: ``(h, w)`` patches, ``h * w == N``, row-major.
        note: a line printed under the legend.
        scale: whole enlargement of both panels; ``None`` makes their longer side about 672 pixels.

    Returns:
        An RGB image.

    Raises:
        ValueError: shapes or indices that do not fit together.
    """
    if scale is None:
        scale = max(1, round(_PANEL_SIDE / max(image.size)))
    attention = _attention(slot_attention, grid)
    tokens = _tokens("kept", kept, grid)
    picks = np.intersect1d(slot_picks(attention), tokens)
    left = kept_panel(image, tokens, grid, picks, scale)
    right = slot_panel(image, attention, grid, tokens, scale)
    owners = len(np.unique(np.argmax(attention, axis=0)))

    width, height = left.size
    text = max(11, min(20, width // 38))
    margin = text + text // 2
    title, small = _font(text + 2), _font(text)
    row = text + text // 2
    top = margin + row + text // 3
    below = margin // 2 + row * (3 if note else 2)
    page = Image.new("RGB", (2 * width + 3 * margin, top + height + below + margin // 2), _PAPER)
    draw = ImageDraw.Draw(page)
    columns = (margin, 2 * margin + width)
    titles = (
        f"kept: {len(tokens)} of {attention.shape[1]} patches",
        f"slots: {owners} of {len(attention)} own a patch",
    )
    for x, panel, words in zip(columns, (left, right), titles, strict=True):
        page.paste(panel, (x, top))
        draw.text((x, margin), words, _INK, title)

    y = top + height + margin // 2
    legends = (
        (
            (PICK_COLOUR, f"a slot's top patch ({len(picks)})"),
            (FILL_COLOUR, f"fill ({len(tokens) - len(picks)})"),
        ),
        ((None, "one colour per slot; dot: the patch kept for it"),),
    )
    for left_edge, entries in zip(columns, legends, strict=True):
        at = float(left_edge)
        for colour, words in entries:
            if colour is not None:
                draw.rectangle((at, y + 2, at + text, y + 2 + text), outline=colour, width=max(2, text // 5))
                at += 1.5 * text
            draw.text((at, y), words, _INK, small)
            at += draw.textlength(words, small) + 1.5 * text
    if note:
        draw.text((margin, y + row + text // 3), note, _FAINT, small)
    return page


def _attention(values: npt.ArrayLike, grid: tuple[int, int] | None = None) -> npt.NDArray[np.float64]:
    attention = np.asarray(values, dtype=np.float64)
    if attention.ndim != 2 or 0 in attention.shape:
        raise ValueError(f"slot_attention must be [K, N] of one image; got shape {list(attention.shape)}")
    if grid is not None and attention.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"slot_attention has {attention.shape[1]} tokens and the grid {grid[0]} x {grid[1]} patches"
        )
    return attention


def _tokens(name: str, values: npt.ArrayLike, grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    tokens = np.asarray(values)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{name} must be [keep] integers of one image; got shape {list(tokens.shape)}, {tokens.dtype}"
        )
    count = grid[0] * grid[1]
    if tokens.size and (tokens.min() < 0 or tokens.max() >= count):
        raise ValueError(f"{name} must lie in [0, {count}); got {tokens.min()} to {tokens.max()}")
    if len(np.unique(tokens)) != len(tokens):
        raise ValueError(f"{name} holds an index twice")
    return tokens.astype(np.int64)


def _grow(image: Image.Image, grid: tuple[int, int], scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """The enlarged picture and the (height, width) of one patch in it."""
    rows, columns = grid
    width, height = image.size
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(
            f"a grid of {rows} x {columns} patches does not divide an image {height} pixels high "
            f"and {width} wide"
        )
    if scale < 1:
        raise ValueError(f"scale must be at least 1; got {scale}")
    picture = image.convert("RGB")
    if scale > 1:
        picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return picture, (height // rows * scale, width // columns * scale)


def _spread(per_patch: npt.NDArray[np.generic], patch: tuple[int, int]) -> npt.NDArray[np.generic]:
    return per_patch.repeat(patch[0], axis=0).repeat(patch[1], axis=1)


def _grey(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]


def _line_width(patch: tuple[int, int]) -> int:
    return max(1, min(patch) // 10)


def _box(token: int, grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int, int, int]:
    row, column = divmod(token, grid[1])
    top, left = row * patch[0], column * patch[1]
    return left, top, left + patch[1] - 1, top + patch[0] - 1


def _draw_borders(
    draw: ImageDraw.ImageDraw, owner: npt.NDArray[np.int64], patch: tuple[int, int], width: int
) -> None:
    high, wide = patch
    for row, column in np.argwhere(owner[:, 1:] != owner[:, :-1]).tolist():
        x = (column + 1) * wide
        draw.line((x, row * high, x, (row + 1) * high), _INK, width)
    for row, column in np.argwhere(owner[1:] != owner[:-1]).tolist():
        y = (row + 1) * high
        draw.line((column * wide, y, (column + 1) * wide, y), _INK, width)


def _assign_colours(owner: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
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


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
