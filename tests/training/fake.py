"""Features that need no encoder, and a run small enough for seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ocvtp import PrunerConfig
from ocvtp.training.recipe import Recipe
from ocvtp.training.trainer import Trained, default_config, train

RECIPE = Recipe(epochs=3, batch_size=4, slots=(2, 4, 8), warmup_epochs=1, validation_share=0.2)


class Fake:
    """A ``FeatureSource``: two records of every photograph, tokens around a few centres."""

    tokens, width, layer, unit = 12, 16, 3, 1

    def __init__(self, records: int = 40, fingerprint: str = "f" * 64) -> None:
        draw = torch.Generator().manual_seed(0)
        centres = torch.randn(records, 3, self.width, generator=draw)
        which = torch.randint(3, (records, self.tokens, 1), generator=draw).expand(-1, -1, self.width)
        noise = torch.randn(records, self.tokens, self.width, generator=draw)
        self.x = (centres.gather(1, which) + 0.2 * noise).half()
        self.images = [f"photo {i // 2}" for i in range(records)]
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return self.x[list(indices)]


def small_config(source: Fake, **changes: Any) -> PrunerConfig:
    return default_config(source, **{"decoder_layers": 2, **changes})


def run(out: Path, source: Fake | None = None, recipe: Recipe = RECIPE, **options: Any) -> Trained:
    """A complete run on the CPU: 8 steps an epoch."""
    source = Fake() if source is None else source
    config = options.pop("config", small_config(source))
    options = {"device": torch.device("cpu"), "log_every": 3, "save_every": 3, **options}
    return train(source, out, recipe, config, **options)
