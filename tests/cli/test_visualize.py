"""The overlay: which pixels stay, which are dimmed, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ocvtp.visualize import (
    FILL_COLOUR,
    PICK_COLOUR,
    kept_panel,
    mass_panel,
    overlay,
    palette,
    slot_panel,
    slot_picks,
)
from ocvtp.visualize.mass import text_size

GRID = (4, 6)


@pytest.fixture
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(60, 255, (4 * 20, 6 * 20, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def attention() -> np.ndarray:
    scores = np.random.default_rng(1).random((5, 24))
    return scores / scores.sum(axis=0)


def patch(picture: Image.Image, token: int, inset: int = 0) -> np.ndarray:
    row, column = divmod(token, GRID[1])
    box = np.asarray(picture)[row * 20 : row * 20 + 20, column * 20 : column * 20 + 20]
    return box[inset : 20 - inset, inset : 20 - inset].astype(int)


def test_kept_patches_keep_their_pixels_and_the_others_are_dimmed(image: Image.Image) -> None:
    panel = kept_panel(image, [0, 9, 23], GRID, picks=[9])
    assert panel.size == image.size
    for token in range(24):
        inside, original = patch(panel, token, inset=3), patch(image, token, inset=3)
        if token in (0, 9, 23):
            assert np.array_equal(inside, original)
        else:
            assert inside.mean() < 0.4 * original.mean()


def test_frames_tell_picks_from_fill(image: Image.Image) -> None:
    panel = kept_panel(image, [0, 9], GRID, picks=[9])
    assert tuple(patch(panel, 9)[0, 0]) == PICK_COLOUR
    assert tuple(patch(panel, 0)[0, 0]) == FILL_COLOUR


def test_patches_of_one_slot_share_a_colour_and_neighbours_differ() -> None:
    grey = Image.new("RGB", (120, 80), (128, 128, 128))
    owner = np.repeat([0, 0, 1, 1, 2, 2], 4).reshape(6, 4).T.ravel()  # three vertical bands
    attention = np.full((3, 24), 0.1)
    attention[owner, np.arange(24)] = 0.8
    panel = slot_panel(grey, attention, GRID)
    centre = {token: tuple(patch(panel, token)[10, 10]) for token in range(24)}
    for token, slot in enumerate(owner):
        for other, other_slot in enumerate(owner):
            assert (centre[token] == centre[other]) == (slot == other_slot)


def test_top_tokens_of_slots() -> None:
    attention = np.array([[0.2, 0.5, 0.5], [0.9, 0.1, 0.1]])
    assert slot_picks(attention).tolist() == [1, 0]


@pytest.mark.parametrize("count", [1, 2, 64, 192])
def test_palette_colours_are_distinct(count: int) -> None:
    colours = palette(count)
    assert colours.shape == (count, 3)
    assert len(np.unique(colours, axis=0)) == count


def test_the_whole_picture(image: Image.Image, attention: np.ndarray) -> None:
    picture = overlay(image, [1, 5, 7], attention, GRID, note="a note", scale=2)
    assert picture.width > 2 * 2 * image.width
    assert picture.height > 2 * image.height
    content = np.asarray(picture)
    assert (content == PICK_COLOUR).all(axis=-1).any() or (content == FILL_COLOUR).all(axis=-1).any()


#: Patches 0, 9 and 23 are kept: the first stands for itself, the second for 6, the third for the rest.
KEPT = [0, 9, 23]
OWNER = np.array([0, *[1] * 2, *[2] * 5, *[1] * 4, *[2] * 12])


def test_whom_kept_patches_stand_for_shows() -> None:
    grey = Image.new("RGB", (120, 80), (128, 128, 128))
    panel = mass_panel(grey, KEPT, OWNER, GRID)
    inside = {token: patch(panel, token, inset=2) for token in range(24)}
    plain = {token: tuple(inside[token][8, 8]) for token in range(24) if token not in KEPT}
    for token, colour in plain.items():
        assert (inside[token] == colour).all()  # nothing is written on it
        for other, other_colour in plain.items():
            assert (colour == other_colour) == (OWNER[token] == OWNER[other])
    assert (patch(panel, 0)[0] == 255).all()  # framed, and nothing written
    assert len(np.unique(inside[0].reshape(-1, 3), axis=0)) == 1
    for token, of in ((9, 1), (23, 8)):  # the same colour, only paler, under a dark number
        pale = inside[token][1, 1]
        assert (pale > plain[of]).all()
        assert (inside[token].min(axis=(0, 1)) < 60).all()
    assert not np.array_equal(inside[9] == inside[9][1, 1], inside[23] == inside[23][1, 1])  # 6, 17


@pytest.mark.parametrize("most", [9, 81, 576, 2304])
def test_numbers_fit_or_become_dots(most: int) -> None:
    """Whatever the number of patches: text that is written stays inside of its patch."""
    from ocvtp.visualize.fonts import font

    for side in (7, 14, 28, 42):
        size = text_size(most, (side, side))
        if size is None:
            assert side < 28
        else:
            left, top, right, bottom = font(size).getbbox(str(most))
            assert right - left <= side
            assert bottom - top <= side
    assert text_size(most, (28, 28)) is not None


def test_dots_grow_with_the_number() -> None:
    grey = Image.new("RGB", (6 * 8, 4 * 8), (128, 128, 128))
    owner = np.where(np.isin(np.arange(24), [1, 2, 3, 9]), 1, 2)
    owner[0] = 0
    owner[22] = 2
    panel = np.asarray(mass_panel(grey, KEPT, owner, GRID)).astype(int)

    def dark(token: int) -> int:
        row, column = divmod(token, 6)
        inside = panel[row * 8 + 1 : row * 8 + 7, column * 8 + 1 : column * 8 + 7]
        return int((inside.max(axis=-1) < 60).sum())

    assert text_size(19, (8, 8)) is None
    assert dark(0) == 0
    assert 0 < dark(9) < dark(23)


@pytest.mark.parametrize("keep", [1, 7, 24])
@pytest.mark.parametrize("slots", [True, False])
def test_a_page_with_masses(image: Image.Image, attention: np.ndarray, keep: int, slots: bool) -> None:
    owner = np.minimum(np.arange(24), keep - 1)
    without = overlay(image, range(keep), attention, GRID, scale=1)
    page = overlay(image, range(keep), attention if slots else None, GRID, owner=owner, scale=1)
    assert (page.width > without.width) == slots  # one panel more than without, or one instead of slots
    assert page.height == without.height
    second = 16 + 120 + 16  # margins and a panel
    top = 16 + 16 + 3
    panel = page.crop((second, top, second + 120, top + 80))
    assert np.array_equal(np.asarray(panel), np.asarray(mass_panel(image, range(keep), owner, GRID)))


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        (OWNER[:-1], r"owner must be \[24\] integers"),
        (OWNER.astype(float), "integers"),
        (np.where(OWNER == 2, 3, OWNER), r"\[0, 3\), positions among kept; got 0 to 3"),
        (OWNER - 1, "got -1 to 1"),
        (np.zeros(24, dtype=int), "every kept token to itself"),
    ],
)
def test_owners_that_are_none(image: Image.Image, owner: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(image, KEPT, None, GRID, owner=owner)
    with pytest.raises(ValueError, match=message):
        mass_panel(image, KEPT, owner, GRID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (5, 6)}, "grid"),
        ({"grid": (7, 6)}, "patches"),
        ({"kept": [24]}, r"\[0, 24\)"),
        ({"kept": [-1]}, r"\[0, 24\)"),
        ({"kept": [3, 3]}, "twice"),
        ({"kept": [0.5]}, "integers"),
        ({"kept": [[1, 2]]}, r"\[keep\]"),
        ({"slot_attention": np.ones((1, 5, 24))}, r"\[K, N\]"),
        ({"scale": 0}, "scale"),
    ],
)
def test_bad_arguments(image: Image.Image, attention: np.ndarray, change: dict, message: str) -> None:
    arguments = {"image": image, "kept": [1, 2], "slot_attention": attention, "grid": GRID, **change}
    with pytest.raises(ValueError, match=message):
        overlay(**arguments)
