"""A folder of pictures with everything wrong in it that a real one has, and an encoder that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HOT = (40, 30)  # of this size, FakeEncoder makes infinity


def noise(seed: int, size: tuple[int, int] = (50, 36)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def good_pictures(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        noise(i, (30 + 3 * i, 40)).save(folder / f"picture{i:02d}.png")


def mixed_pictures(folder: Path) -> Path:
    """Seven good ones; a copy, one that is never finite, one whose whole is not, and three broken files."""
    good_pictures(folder, 5)
    (folder / "sub").mkdir()
    noise(20).save(folder / "sub" / "photo.JPG", format="jpeg")
    noise(21).save(folder / "zebra.bmp")
    (folder / "picture02copy.png").write_bytes((folder / "picture01.png").read_bytes())
    noise(22, HOT).save(folder / "picture03half.png")
    Image.new("RGB", (33, 21), (255, 0, 0)).save(folder / "picture02red.png")
    whole = (folder / "sub" / "photo.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "picture03text.png").write_text("not a picture")
    (folder / "zero.gif").touch()
    (folder / "notes.txt").write_text("neither taken nor told of")
    return folder


BROKEN = {"cut.jpg", "picture03text.png", "zero.gif"}
GOOD = 7


class FakeEncoder:
    """Colours of a 2 x 2 thumbnail; also of how many others were in the batch, and where in it.

    Real encoders differ in the last bit by that: batches that are cut otherwise after a restart must show.
    """

    tokens, width, layer, unit, name, note = 4, 3, 2, 1, "fake", None

    def __init__(self, **identity: object) -> None:
        self.identity = {
            "weights": "w",
            "preprocessing": {"size": 2},
            "layer": 2,
            "dtype": "float32",
            **identity,
        }
        self.fingerprint = str(sorted(self.identity.items()))
        self.calls = 0

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        self.calls += 1
        rows = []
        for place, image in enumerate(images):
            pixels = np.asarray(image.resize((2, 2), Image.Resampling.BOX), dtype=np.float32)
            row = torch.from_numpy(pixels).reshape(4, 3) + 0.25 * place + 0.5 * len(images)
            red = bool((pixels == (255, 0, 0)).all())
            rows.append(torch.full_like(row, torch.inf) if red or image.size == HOT else row)
        return torch.stack(rows).half()


RECORD_BYTES = FakeEncoder.tokens * FakeEncoder.width * 2


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
