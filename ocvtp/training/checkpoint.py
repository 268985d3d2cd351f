"""A training run's state in one file: parameters, optimizer moments, and where it stands.

Safetensors with the numbers as JSON in its header: nothing in it is ever executed, and one file can be
replaced atomically. It is sealed, and says what lies beside it: the rows of metrics and the best pruner that
belong to it, by their digests. So replacing it is the one moment at which all of them are taken over.
Random state is not in it: every draw follows from the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from ocvtp.atomic import write_atomic
from ocvtp.stored.fields import Within, from_object
from ocvtp.stored.refused import Refused, refused_as
from ocvtp.stored.tensors import check_tensors, read_facts, save_sealed
from ocvtp.training.log import Rows

STATE = "state.safetensors"
#: What to do about a run whose files are not what was written.
ADVICE = "copy it back as it was, begin anew with --fresh (fresh=True), or give another folder"
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
        rows: of metrics, how many bytes of the file are this run's so far.
        pruner: files of the best pruner and their SHA-256.
    """

    identity: dict[str, dict[str, Any]]
    step: Annotated[int, Within(0, 2**62)] = 0
    best_loss: float | None = None
    best_epoch: Annotated[int, Within(0, 2**62)] = 0
    stale: Annotated[int, Within(0, 2**62)] = 0
    finished: str = ""
    skipped: Annotated[int, Within(0, 2**62)] = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rows: Rows = field(default_factory=Rows)
    pruner: dict[str, str] = field(default_factory=dict)


def save(folder: Path, progress: Progress, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the state in ``folder``, atomically."""
    names = [name for name, _ in model.named_parameters()]
    tensors = {_PARAMETER + name: value.detach() for name, value in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        for kind, value in moments.items():
            tensors[f"{_MOMENT}{names[index]}/{kind}"] = torch.as_tensor(value)
    on_cpu = {name: value.to("cpu").contiguous() for name, value in tensors.items()}
    write_atomic(folder / STATE, lambda partial: save_sealed(partial, on_cpu, asdict(progress)))


def read_progress(folder: Path) -> Progress | None:
    """Where the run in ``folder`` stands, or ``None`` if none was begun.

    Raises:
        ResumeError: a file that is no such state, or not as it was written; names the field.
    """
    if not (folder / STATE).exists():
        return None
    return _read(folder)[0]


def restore(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put parameters and moments of ``folder``'s state into ``model`` and ``optimizer``.

    Raises:
        ResumeError: parameters of another model, or not those that were written; names them.
    """
    from safetensors.torch import load_file

    _, digests = _read(folder)
    tensors = load_file(folder / STATE)
    with refused_as(ResumeError, folder / STATE, ADVICE):
        check_tensors(tensors, digests)
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


def _read(folder: Path) -> tuple[Progress, dict[str, str]]:
    """The state but its tensors, and what their digests are."""
    path = folder / STATE
    with refused_as(ResumeError, path, ADVICE):
        found = read_facts(path)
        if found is None:
            raise Refused("it is not the state of a training run, or one of an older version of ocvtp")
        facts, digests = found
        return from_object(Progress, facts), digests


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
