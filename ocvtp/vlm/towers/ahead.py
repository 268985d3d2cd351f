"""Fill scores off the critical path: beside the layer whose input they are made of, not behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.selector import Beside, Started
from ocvtp.vlm.contracts.weights import is_minded, is_plain
from ocvtp_kernels._backend import resolve_backend


def ahead(
    beside: Beside | None,
    layer: Any,
    reads: Sequence[torch.Tensor],
    work: Callable[[], torch.Tensor],
    backend: str,
) -> Started | None:
    """Start to compute scores, if there is a place beside the tower; ``None`` if they have to follow it.

    Args:
        beside: starts something there.
        layer: that is about to run, and whose queries and keys ``work`` projects.
        reads: its input, and what else ``work`` reads of the call.
        work: makes the scores, by kernels if any are to be used.
        backend: of the operation.
    """
    if beside is None or torch.compiler.is_compiling() or layer.training:
        return None
    hidden = reads[0]
    # Weights that are brought when a layer is called are brought for one caller at a time; autocast and
    # quantised layers keep what they make of weights, and the layer itself would not wait for it.
    if is_minded(layer) or not is_plain(layer) or _autocast(hidden.device) or hidden.dtype == torch.float64:
        return None
    if resolve_backend(backend, "received_attention", hidden.device) != "triton":
        return None
    return beside(work, reads)


def _autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
