"""The shipped model and pruners, as anybody would load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.testbed.export import ASSETS
from ocvtp import OCPruner

MODEL = ASSETS / "testbed"


def load_model(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """``(model in float32, processor)``."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def load_pruners(folders: dict[str, Path], device: torch.device) -> dict[str, OCPruner]:
    """In evaluation mode."""
    return {name: OCPruner.from_pretrained(str(path)).to(device).eval() for name, path in folders.items()}
