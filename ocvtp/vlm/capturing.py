"""Whether the whole vision side of a model can be recorded as one CUDA graph, which somebody asked for."""

from __future__ import annotations

import torch

from ocvtp.pruner.lane import lane_for
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.selector import Selector
from ocvtp.vlm.encode.graphs import VisionGraphs
from ocvtp.vlm.encode.selectors import PrunerSelector, RuleSelector
from ocvtp.vlm.encode.watched import why_unsteady
from ocvtp.vlm.options import Options


def graphs_for(
    adapter: Adapter, options: Options, selector: Selector | Reducer, device: torch.device
) -> VisionGraphs | None:
    """Where the vision side's graphs will be, if ``capture="vision"``.

    Args:
        adapter: of the model.
        options: what was asked.
        selector: who chooses.
        device: of the tower.

    Raises:
        ValueError: it can't be recorded, on this device or at all.
    """
    if options.capture != "vision":
        return None
    parts = adapter.vision_parts
    pruner = selector.pruner if isinstance(selector, PrunerSelector) else None
    reason = adapter.unsteady or _why_not(options, selector)
    if reason is None and pruner is not None:
        unsteady = why_unsteady([pruner], training=True)
        reason = None if unsteady is None else f"of the pruner, {unsteady}"
    if reason is None:
        unsteady = why_unsteady(parts, training=True)
        reason = None if unsteady is None else f"of the vision side, {unsteady}"
    if reason is None and lane_for(device) is None:
        reason = f"the vision tower is on {device}: move the model to a CUDA GPU first"
    if reason is not None:
        raise ValueError(f'capture="vision" is not possible here: {reason}; or capture=True')
    return VisionGraphs(parts, adapter.model.model, pruner)


def _why_not(options: Options, selector: Selector | Reducer) -> str | None:
    if isinstance(selector, Reducer):
        return f"{selector.title} may ask the host in between, so it is for pruners and rules of our own"
    if isinstance(selector, RuleSelector) and selector.name in ("random", "grid"):
        return f"the host tells what {selector.name!r} keeps, in every call"
    if isinstance(selector, PrunerSelector) and not selector.runs_alone:
        return "it takes an ocvtp.OCPruner itself, without hooks"
    if options.keep == "auto":
        return 'with keep="auto" the device decides how long the prompt is'
    if options.newlines == "rows":
        return 'with newlines="rows" the device decides how long the prompt is'
    return None
