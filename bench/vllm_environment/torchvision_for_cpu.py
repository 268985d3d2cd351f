"""Lets the torchvision of the package index, a CUDA build, be imported beside a CPU build of torch.

Its compiled half can't be loaded then, and importing it fails where it describes operators that nobody has
declared. Declared here are the two that it stumbles over; nothing implements them, and nothing here calls
them. A ``.pth`` file beside this one imports it whenever Python starts.
"""

from __future__ import annotations

import sys
from typing import Any

_kept: list[Any] = []


class _BeforeTorchvision:
    """Declares the operators when somebody first asks for torchvision, and finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)  # a declaration lasts as long as this lives


sys.meta_path.insert(0, _BeforeTorchvision())
