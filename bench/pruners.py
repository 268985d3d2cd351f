"""Pruners as a benchmark is given them: folders, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def named(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, or a folder, which is called by its own name."""
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals else (Path(text).resolve().name, Path(text))


def training_notes(folder: Path) -> Any:
    """What ``ocvtp train`` wrote beside a pruner, or ``None``."""
    file = folder / "training.json"
    return json.loads(file.read_text()) if file.exists() else None
