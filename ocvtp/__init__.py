"""Object-centric vision-token pruning for vision-language models (OC-VTP, arXiv 2511.20439).

    pruner = ocvtp.OCPruner.from_official("weights.pth")
    ocvtp.apply(model, pruner, keep=64)
    model.generate(**inputs)

Names load on first use, so importing the package costs next to nothing and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ocvtp.pruner import OCPruner, PrunerConfig, Reconstruction
    from ocvtp.pruner.checkpoint import CheckpointError
    from ocvtp.selection import Selection
    from ocvtp.vlm import PatchError, PruneReport, UnsupportedModelError, apply, pruned, remove
    from ocvtp_kernels import BackendUnavailableError
    from ocvtp_kernels.reconstruction import area_weighted_mse

__version__ = "0.1.0"

_HOME = {
    "BackendUnavailableError": "ocvtp_kernels",
    "CheckpointError": "ocvtp.pruner.checkpoint",
    "OCPruner": "ocvtp.pruner",
    "PatchError": "ocvtp.vlm",
    "PruneReport": "ocvtp.vlm",
    "PrunerConfig": "ocvtp.pruner",
    "Reconstruction": "ocvtp.pruner",
    "Selection": "ocvtp.selection",
    "UnsupportedModelError": "ocvtp.vlm",
    "apply": "ocvtp.vlm",
    "area_weighted_mse": "ocvtp_kernels.reconstruction",
    "pruned": "ocvtp.vlm",
    "remove": "ocvtp.vlm",
}

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "OCPruner",
    "PatchError",
    "PruneReport",
    "PrunerConfig",
    "Reconstruction",
    "Selection",
    "UnsupportedModelError",
    "apply",
    "area_weighted_mse",
    "pruned",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ocvtp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
