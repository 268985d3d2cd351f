"""Finding, decoding and cutting pictures; files that are there completely or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ocvtp.atomic import write_atomic, write_json
from ocvtp.images import BadImageError, NoImagesError, decode, digest, find_images, square
from tests.training.pictures import mixed_pictures, noise


def test_found_by_name_whatever_the_file_system_says(tmp_path: Path) -> None:
    mixed_pictures(tmp_path)
    (tmp_path / "folder.png").mkdir()
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == sorted(names)
    assert "sub/photo.JPG" in names
    assert len(names) == 13
    assert not {"notes.txt", "folder.png"} & set(names)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(NoImagesError, match="no images in"):
        find_images(tmp_path)
    with pytest.raises(NoImagesError, match="no folder at"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cut.jpg", "picture03text.png", "zero.gif"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadImageError, match=f"{name} can't be decoded as an image"):
        decode(mixed_pictures(tmp_path) / name)


@pytest.mark.parametrize("length", [30, 60, 120, 200])
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "gif", "bmp"])
def test_truncated_files_of_every_kind(tmp_path: Path, suffix: str, length: int) -> None:
    whole = tmp_path / f"whole.{suffix}"
    noise(0).save(whole)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(BadImageError, match=f"cut.{suffix}"):
        decode(cut)


def test_whatever_a_decoder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(0).save(tmp_path / "a.png")
    for error, expected in ((KeyError("x"), BadImageError), (MemoryError(), MemoryError)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
        with pytest.raises(expected):
            decode(tmp_path / "a.png")


def test_a_file_that_vanished(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match=r"gone.png can't be read: No such file"):
        digest(tmp_path / "gone.png")


def test_upright_rgb_and_eight_bit(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(0, (20, 10)).save(tmp_path / "turned.jpg", exif=turned)
    assert decode(tmp_path / "turned.jpg").size == (10, 20)
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    deep = decode(tmp_path / "deep.png")
    assert deep.mode == "RGB"
    assert deep.getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("size", [(50, 36), (36, 50), (1, 1), (7, 1)])
def test_squares(size: tuple[int, int]) -> None:
    image, shorter = noise(0, size), min(size)
    assert square(image, "content", 0) is image
    for crop in range(1, 30):
        cut = square(image, "content", crop)
        assert cut.width == cut.height
        assert (shorter + 1) // 2 <= cut.width <= shorter
        assert cut.tobytes() == square(image, "content", crop).tobytes()
    if shorter > 1:
        cuts = {square(image, content, crop).tobytes() for content in "ab" for crop in range(1, 10)}
        assert len(cuts) == 18
    # A square holds pixels of the picture, nothing from beyond its edge.
    white = Image.new("RGB", size, "white")
    assert all(square(white, "c", crop).getextrema() == ((255, 255),) * 3 for crop in range(1, 30))


def test_squares_do_not_change_between_releases() -> None:
    """Stored crops and fresh ones, of whatever Python, are the same."""
    ramp = Image.new("RGB", (60, 40))
    ramp.putdata([(x, y, 0) for y in range(40) for x in range(60)])
    cut = square(ramp, "0123", 1)
    assert (*cut.getpixel((0, 0))[:2], cut.width) == CORNER


CORNER = (15, 5, 25)  # left, top, side


class Died(BaseException):
    """What a kill looks like from inside."""


def test_old_or_new_never_half(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, lambda partial: partial.write_text("old") and None)

    def half(partial: Path) -> None:
        (partial.parent / ".tmp123").write_text("as safetensors does")
        partial.write_text("ne")
        raise Died

    with pytest.raises(Died):
        write_atomic(path, half)
    assert path.read_text() == "old"
    write_atomic(path, lambda partial: partial.write_text("new") and None)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_dying_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, [1])

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(Died):
            write_json(path, [2])
    assert path.read_text().split() == ["[", "1", "]"]
    write_json(path, [3])
    assert path.read_text().split() == ["[", "3", "]"]
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_rights_are_the_users_choice(tmp_path: Path, umask: int, mode: int) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "f", lambda partial: save_file({"x": torch.ones(1)}, partial))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode
