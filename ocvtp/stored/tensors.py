"""Safetensors files that say what they hold, sealed: tensors, and facts as JSON in the header.

All facts are under one key of the header's metadata: safetensors writes several in an order that changes
from run to run, and equal content must be equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ocvtp.stored.refused import Refused
from ocvtp.stored.seal import check_digests, sealed, tensor_digest, unsealed
from ocvtp.stored.strict_json import parse_object

KEY = "ocvtp"
_TENSORS = "tensors"


def save_sealed(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``tensors``, contiguous and on the CPU, with ``facts``, JSON-ready, and digests of all of it."""
    from safetensors.torch import save_file

    digests = _digests(tensors)
    text = json.dumps(sealed({**facts, _TENSORS: digests}), sort_keys=True)
    save_file(dict(tensors), path, metadata={KEY: text})


def read_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """What a file of :func:`save_sealed` says, and the digest of every tensor; ``None`` if it says nothing.

    Raises:
        Refused: no safetensors file, or facts that are not what was written.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise Refused("it is a folder, not a file" if path.is_dir() else "it is missing, or no regular file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise Refused(f"it is no whole safetensors file ({error})") from error
    if text is None:
        return None
    try:
        facts = unsealed(parse_object(text))
        digests = facts.pop(_TENSORS, None)
        if not isinstance(digests, dict):
            raise Refused(f"it lacks {_TENSORS}")
    except Refused as error:
        raise Refused(f"{KEY} in its header: {error}") from error
    return facts, digests


def check_tensors(tensors: Mapping[str, torch.Tensor], digests: Mapping[str, str]) -> None:
    """Raise :class:`Refused` unless these are the tensors that were written; names those that are not."""
    check_digests(digests, _digests(tensors))


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """On all cores: hashing lets go of Python's lock, and a state may be a gigabyte."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))
