"""The command line and the arguments that make vLLM serve a pruned model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ocvtp.serving.vllm.plan import plan_for
from ocvtp.serving.vllm.spec import KEY, Spec
from ocvtp.serving.vllm.twins import architecture_of

_FLAG = "--hf-overrides"


def overrides(config: Any, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``hf_overrides`` for a model, checked against its configuration.

    Args:
        config: of the model.
        model: folder or Hub id it came from.
        settings: fields of :class:`Spec`.

    Raises:
        UnsupportedModelError, TypeError, ValueError, OSError: see :func:`ocvtp.serving.engine_args`.
    """
    spec = Spec.from_dict(settings)
    architecture = architecture_of(config, model)
    plan_for(config, spec, model)
    said = dict(settings)
    if spec.rule is None and os.path.exists(spec.pruner):
        said["pruner"] = os.path.abspath(spec.pruner)  # a server may run elsewhere
    return {"architectures": [architecture], KEY: said}


def command(model: str, ours: Mapping[str, Any], rest: Sequence[str]) -> list[str]:
    """``vllm serve`` with our overrides and the user's own options.

    Args:
        model: folder or Hub id.
        ours: of :func:`overrides`.
        rest: vLLM's own options. Overrides among them are joined with ours.

    Raises:
        ValueError: overrides that are no JSON object, or that say what ours say.
    """
    theirs, kept = _overrides_in(rest)
    both = sorted(set(theirs) & set(ours))
    if both:
        raise ValueError(f"{_FLAG} sets {', '.join(both)}, which ocvtp serve has to set: leave it out")
    return ["vllm", "serve", model, _FLAG, json.dumps({**theirs, **ours}), *kept]


def _overrides_in(rest: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a user overrides, and the options that are left."""
    found: dict[str, Any] = {}
    kept: list[str] = []
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        spelled = name.replace("_", "-")
        if spelled.startswith(f"{_FLAG}."):
            raise ValueError(f"give {_FLAG} one JSON object, not {word}")
        if spelled == "--config":
            file = value if equals else next(words, "")
            kept += [word] if equals else [word, file]
            _check_file(file)
            continue
        if spelled != _FLAG:
            kept.append(word)
            continue
        text = value if equals else next(words, "")
        try:
            read = json.loads(text)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"{_FLAG} must be a JSON object; got {text!r}")
        found.update(read)
    return found, kept


def _check_file(file: str) -> None:
    """vLLM lets the command line win over a file of options, so overrides in it would be lost."""
    try:
        with open(file, encoding="utf-8") as opened:
            lines = opened.read().replace("_", "-").splitlines()
    except OSError as error:
        raise ValueError(f"--config {file} can't be read: {error}") from error
    if any(line.lstrip().startswith(_FLAG.lstrip("-")) for line in lines):
        raise ValueError(f"{file} has {_FLAG.lstrip('-')}, which ocvtp serve has to set: give {_FLAG} here")
