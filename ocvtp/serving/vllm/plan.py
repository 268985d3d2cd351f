"""From settings and a model's configuration to who chooses how many: the same in front end and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.serving.vllm.spec import Spec
from ocvtp.vlm.choosing import selector_for
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.fit import check_fit, check_layers
from ocvtp.vlm.contracts.layout import Layout
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.layouts import layout_for
from ocvtp_kernels._backend import resolve_backend


@dataclass(frozen=True)
class Plan:
    """What will be done to every image of an engine.

    Attributes:
        spec: what was asked.
        layout: of the model's images.
        settings: of :mod:`ocvtp.vlm`.
    """

    spec: Spec
    layout: Any
    settings: Settings

    def keep(self, tokens: int) -> int:
        """Tokens kept of an image, tile or crop of ``tokens``."""
        kept = self.settings.budget.of(tokens)
        assert isinstance(kept, int)
        return kept


def plan_for(config: Any, spec: Spec, model: str = "MODEL", device: torch.device | None = None) -> Plan:
    """Check everything that can be checked without the model's weights.

    Args:
        config: of the model.
        spec: what was asked.
        model: where it was loaded from, for messages.
        device: that will compute; ``None`` if nobody knows yet.

    Raises:
        UnsupportedModelError: a vision tower that is not known.
        TypeError, ValueError, OSError: a pruner that can't be had, or settings that don't suit the model.
        BackendUnavailableError: an explicit backend that ``device`` can't run.
    """
    layout: Layout = layout_for(config)
    facts = layout.facts({})
    options = spec.options()
    if spec.rule is None:
        check_fit(spec.load_pruner().config, facts, model)
    if device is not None:
        resolve_backend(spec.backend, "received_attention", device)
    selector = selector_for(options, facts.consumed_layers)
    check_layers(selector.read_layer, facts.consumed_layers)
    settings = Settings(
        selector=selector,
        budget=Budget(options.keep),
        positions="compact",
        backend=options.backend,
        route="inputs_embeds",
        attention="vllm",
        newlines=options.newlines,
        merge="off" if spec.merge == "off" else "projected",
    )
    layout.check(settings)
    return Plan(spec, layout, settings)
