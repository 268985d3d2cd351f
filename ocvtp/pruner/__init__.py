"""The pruner: features in, :class:`~ocvtp.Selection` out; its weights, and where they come from."""

from __future__ import annotations

from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.pruner import OCPruner, Reconstruction

__all__ = ["OCPruner", "PrunerConfig", "Reconstruction"]
