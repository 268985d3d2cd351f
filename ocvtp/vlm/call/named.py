"""Arguments of a call by name, as Python would bind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def positional_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a method takes by position, without ``self``."""
    parameters = inspect.signature(method).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)[1:]


def by_name(
    method: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call.

    Args:
        method: for messages.
        names: of :func:`positional_names`.
        args: of the call.
        kwargs: of the call.

    Raises:
        TypeError: too many, or one of them twice.
    """
    if len(args) > len(names):
        raise TypeError(f"{method}() takes at most {len(names)} positional arguments; got {len(args)}")
    given = {names[i]: value for i, value in enumerate(args)}  # torch 2.7 can't trace zip(strict=)
    for name in given:
        if name in kwargs:
            raise TypeError(f"{method}() got multiple values for argument {name!r}")
    return {**given, **kwargs}
