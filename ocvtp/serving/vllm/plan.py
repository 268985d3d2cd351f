"""From settings and a model's configuration to who chooses how many: the same in front end and workers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

import ocvtp
from ocvtp.pruner import OCPruner
from ocvtp.serving.vllm.spec import Spec
from ocvtp.vlm.choosing import selector_for
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.fit import check_fit, check_layers
from ocvtp.vlm.contracts.layout import Layout, TowerFacts
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
        digest: tells engines apart that would make other rows of the same image: part of every cache key.
            A pruner counts by its weights: a folder's name says nothing of what is in it, and a copy is no
            other.
    """

    spec: Spec
    layout: Any
    settings: Settings
    digest: str

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
        TypeError, ValueError, OSError: a pruner that can't be had, settings that don't suit the model, or a
            precision that ``device`` can't compute in.
        BackendUnavailableError: an explicit backend that it can't run.
    """
    layout: Layout = layout_for(config)
    facts = layout.facts({})
    pruner = spec.load_pruner() if spec.rule is None else None
    options = spec.options(pruner)
    if pruner is not None:
        check_fit(pruner.config, facts, model)
    if device is not None:
        resolve_backend(spec.backend, "received_attention", device)
        if pruner is not None:
            pruner.arithmetic(device, spec.backend, spec.precision)
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
    return Plan(spec, layout, settings, _digest(spec, pruner, facts))


def _digest(spec: Spec, pruner: OCPruner | None, facts: TowerFacts) -> str:
    said = {
        **dataclasses.asdict(spec),
        "ocvtp": ocvtp.__version__,
        "tower": {**dataclasses.asdict(facts), "device": None},
    }
    made = hashlib.sha256()
    if pruner is not None:
        del said["pruner"], said["layer"]
        said["config"] = dataclasses.asdict(pruner.config)
        for name, tensor in sorted(pruner.state_dict().items()):
            made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    made.update(json.dumps(said, sort_keys=True).encode())
    return made.hexdigest()[:24]
