"""Pictures from files: found in a fixed order, decoded upright and in RGB, cut into squares."""

from __future__ import annotations

import hashlib
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

#: What :func:`find_images` takes for pictures.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class BadImageError(ValueError):
    """A file that can't be read, or not decoded as an image."""


class NoImagesError(ValueError):
    """A folder without an image that can be used."""


def find_images(folder: Path) -> list[Path]:
    """Every picture below ``folder``, by name; the file system's own order does not matter.

    Raises:
        NoImagesError: not a folder, or no picture in it.
    """
    if not folder.is_dir():
        raise NoImagesError(f"no folder at {folder}; give the folder that holds the images")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise NoImagesError(f"no images in {folder}; looked for {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def decode(path: Path) -> Image:
    """The picture at ``path``: upright, RGB, 16 bits scaled down to 8.

    Raises:
        BadImageError: says what is wrong with it.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; they would tear a progress bar apart
            with Image.open(path) as image:
                return _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file pillow's decoders raise all kinds: struct.error, KeyError
        raise BadImageError(f"{path} can't be decoded as an image: {error}") from error


def digest(path: Path) -> str:
    """SHA-256 of the file's content.

    Raises:
        BadImageError: a file that can't be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadImageError(f"{path} can't be read: {error.strerror}") from error


def square(image: Image, content: str, crop: int) -> Image:
    """Crop number ``crop`` of an image whose content has this digest: always the same one.

    Number 0 is the whole image; the others are squares of at least half the shorter side.
    """
    if crop == 0:
        return image
    draw = random.Random(f"{content}/{crop}")
    shorter = min(image.size)
    side = draw.randint((shorter + 1) // 2, shorter)
    x, y = draw.randint(0, image.width - side), draw.randint(0, image.height - side)
    return image.crop((x, y, x + side, y + side))


def _eight_bit(image: Image) -> Image:
    """16-bit greyscale scaled down; pillow's own conversion would clip nearly all of it to white."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image as images

    return images.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
