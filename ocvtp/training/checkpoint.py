"""A training run's state in one file: parameters, optimizer moments, and where it stands.

Safetensors with the numbers as JSON in its header: nothing in it is ever executed, and one file can be
replaced atomically. Random state is not in it: every draw follows from the seed and the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ocvtp.atomic import write_atomic

STATE = "state.safetensors"
_META = "ocvtp.training"
_PARAMETER, _MOMENT = "parameter.", "optimizer."


class ResumeError(ValueError):
    """A folder whose run can't be taken up; the message says what to do."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        identity: recipe, pruner, features: what must be the same to go on.
        step: steps done.
        best_loss: smallest validation loss so far, ``None`` before the first.
        best_epoch: when that was, counted from 1.
        stale: validations since then.
        finished: ``""``, ``"all epochs"`` or ``"early"``.
        skipped: steps in a row that float16 overflowed in.
        scaler: of the loss, under float16.
        versions: of what wrote it.
    """

    identity: dict[str, Any]
    step: int = 0
    best_loss: float | None = None
    best_epoch: int = 0
    stale: int = 0
    finished: str = ""
    skipped: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def save(folder: Path, progress: Progress, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the state in ``folder``, atomically."""
    from safetensors.torch import save_file

    names = [name for name, _ in model.named_parameters()]
    tensors = {_PARAMETER + name: value.detach() for name, value in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        for kind, value in moments.items():
            tensors[f"{_MOMENT}{names[index]}/{kind}"] = torch.as_tensor(value)
    on_cpu = {name: value.to("cpu").contiguous() for name, value in tensors.items()}
    header = {_META: json.dumps(asdict(progress))}
    write_atomic(folder / STATE, lambda partial: save_file(on_cpu, partial, metadata=header))


def read_progress(folder: Path) -> Progress | None:
    """Where the run in ``folder`` stands, or ``None`` if none was begun.

    Raises:
        ResumeError: a file that is no such state.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return Progress(**json.loads((file.metadata() or {})[_META]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"{path} is not the state of a training run ({error}); give another folder"
        ) from error


def restore(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put parameters and moments of ``folder``'s state into ``model`` and ``optimizer``.

    Raises:
        ResumeError: parameters of another model.
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / STATE)
    parameters = dict(model.named_parameters())
    stored = {name[len(_PARAMETER) :]: t for name, t in tensors.items() if name.startswith(_PARAMETER)}
    if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ResumeError(f"{folder / STATE} holds parameters of another pruner; give another folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    index = {name: i for i, name in enumerate(parameters)}
    for key, value in tensors.items():
        if key.startswith(_MOMENT):
            name, kind = key[len(_MOMENT) :].rsplit("/", 1)
            moments.setdefault(index[name], {})[kind] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise :class:`ResumeError` unless two identities are equal; names what differs."""
    differ = [
        f"{part}.{name} was {before.get(part, {}).get(name)!r}, is {now.get(part, {}).get(name)!r}"
        for part in sorted({*before, *now})
        for name in sorted({*before.get(part, {}), *now.get(part, {})})
        if before.get(part, {}).get(name) != now.get(part, {}).get(name)
    ]
    if differ:
        raise ResumeError(
            f"{folder} holds a run of its own: {'; '.join(differ)}. Give another folder, or the same settings"
        )
