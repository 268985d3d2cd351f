"""Digests of what a file says, kept in it: what was changed or damaged since is named, not used.

A seal is no signature: whoever wants to can make a new one. It tells what was altered by hand, by a tool or
by a disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ocvtp.stored.refused import Refused

SEAL = "seal"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, JSON-ready, with a digest of every field under ``"seal"``.

    Raises:
        ValueError: a number that is not finite, which JSON has not.
    """
    return {**values, SEAL: {name: _digest(name, value) for name, value in values.items()}}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without their seal.

    Raises:
        Refused: no seal, or a field that was changed, added or taken away; names it.
    """
    seal = values.get(SEAL)
    if not isinstance(seal, dict):
        raise Refused(
            f"{SEAL} is missing: the digests of what was written" if seal is None else _altered([SEAL])
        )
    bare = {name: value for name, value in values.items() if name != SEAL}
    try:
        check_digests(seal, {name: _digest(name, value) for name, value in bare.items()})
    except RecursionError as error:
        raise Refused("it is nested too deeply") from error
    return bare


def check_digests(written: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise :class:`Refused` unless both have the same names and digests; tells all that differ."""
    if gone := sorted(written.keys() - found.keys()):
        raise Refused(f"it lacks {_listed(gone)}, which was written")
    if added := sorted(found.keys() - written.keys()):
        raise Refused(f"it has {_listed(added)}, which was never written")
    if changed := sorted(name for name in found if found[name] != written[name]):
        raise Refused(_altered(changed))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        total = hashlib.sha256()
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, on whatever device and in whatever strides it lies."""
    total = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    total.update(raw.numpy().data)
    return total.hexdigest()


def _digest(name: str, value: object) -> str:
    # NaN would be written, and refused when it is read back.
    text = json.dumps([name, value], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _altered(names: list[str]) -> str:
    return f"{_listed(names)} {'is' if len(names) == 1 else 'are'} not what was written: changed or damaged"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
