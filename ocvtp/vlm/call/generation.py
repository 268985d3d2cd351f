"""Parameters of generation, wherever they were said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def effective(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """A generation parameter: argument before ``generation_config`` before the model's default."""
    for value in (
        arguments.get(name),
        getattr(arguments.get("generation_config"), name, None),
        getattr(getattr(model, "generation_config", None), name, None),
    ):
        if value is not None:
            return value
    return None


def pad_token_id(model: Any, arguments: Mapping[str, Any]) -> int:
    """What new padding is filled with."""
    pad = effective(model, arguments, "pad_token_id")
    if pad is None:
        pad = model.config.get_text_config().pad_token_id
    return 0 if pad is None else int(pad)
