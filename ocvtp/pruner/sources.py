"""Pruners from whatever names one: a folder, a repository, a file of official weights."""

from __future__ import annotations

import os

from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.pruner import OCPruner


def read_pruner(source: str, layer: int | None = None) -> OCPruner:
    """A pruner, on the CPU.

    Args:
        source: our folder, a Hub repository, or an official weights file.
        layer: encoder layer that official weights were trained on, which they don't say; our own format does.

    Raises:
        OSError, ValueError: see :meth:`OCPruner.from_pretrained` and :meth:`OCPruner.from_official`.
    """
    if not os.path.isfile(source):
        return OCPruner.from_pretrained(source, layer=layer)
    return OCPruner.from_official(source, layer=PrunerConfig.layer if layer is None else layer)
