"""The overlay: which pixels stay, which are dimmed, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ocvtp.visualize import FILL_COLOUR, PICK_COLOUR, kept_panel, overlay, palette, slot_panel, slot_picks

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
