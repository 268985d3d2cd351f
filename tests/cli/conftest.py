"""Tiny model, pruner and photograph on disk: what a user of the command line has."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.vlm.processor import write_processor
from tests.vlm.tiny_llava import llava, pruner


class Files(NamedTuple):
    """Paths of a complete set."""

    model: Path
    pruner: Path
    image: Path

    @property
    def arguments(self) -> list[str]:
        """For ``prune`` and ``visualize``."""
        return [str(self.image), "--model", str(self.model), "--pruner", str(self.pruner), "--device", "cpu"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    made = Files(folder / "model", folder / "pruner", folder / "photo.jpg")
    llava().save_pretrained(made.model)
    write_processor(made.model)
    pruner().save_pretrained(made.pruner)
    noise = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC).save(made.image)
    return made
