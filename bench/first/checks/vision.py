"""The vision side of LLaVA-1.5 with one image: tower, choice, projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.first.checks.setting import Setting
from bench.first.run import Finding
from bench.guard.vlm import small_pruner, small_vision, vision_call, vision_model


def vision(setting: Setting) -> Iterator[Finding]:
    """Microseconds to rows for the language model: from Python, and as one graph."""
    for what, capture in (("slots replayed from a graph", True), ("slots launched one by one", False)):
        call = vision_call(_model(setting, capture), 1)
        for _ in range(4):
            call()
        yield {"what": f"eager, {what}", "us": setting.eager_us(call)}
    call = vision_call(_model(setting, False), 1)
    yield {"what": "all of it as one graph", **_graph(call, setting)}


def _graph(call: Callable[[], object], setting: Setting) -> dict[str, Any]:
    try:
        return {"us": setting.graph_us([call])}
    except RuntimeError as error:
        return {"can't be captured": str(error).splitlines()[0][:100]}


def _model(setting: Setting, capture: bool) -> Any:
    if setting.on_gpu:
        return vision_model(torch.float16, setting.device, capture=capture)
    small, pruner = small_vision(), small_pruner()
    return vision_model(torch.float32, setting.device, vision=small, pruner=pruner, keep=5, capture=capture)
