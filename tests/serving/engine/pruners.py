"""Small random pruners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import ocvtp
from ocvtp.vlm.layouts import layout_for

#: Of a model's folder, and perhaps a seed, to the folder of a pruner; the fixture ``pruner_for``.
Pruners = Callable[..., Path]


def write(folder: Path, model: Path, seed: int) -> Path:
    """A pruner whose slots differ, for the tower of a model."""
    from transformers import AutoConfig

    facts = layout_for(AutoConfig.from_pretrained(model)).facts({})
    torch.manual_seed(seed)
    config = ocvtp.PrunerConfig(
        in_dim=facts.width, hidden_dim=64, slot_dim=32, ffn_dim=64, layer=1, unit=facts.unit
    )
    pruner = ocvtp.OCPruner(config)
    with torch.no_grad():
        for parameter in pruner.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    pruner.save_pretrained(folder)
    return folder
