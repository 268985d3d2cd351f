"""Hooks on a model: put on, found again, taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ocvtp.methods.in_llm.contract import Method
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.in_llm.hooks import Hooks

_ATTRIBUTE = "_ocvtp_inside"
_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def install(model: Any, method: Method, *, placeholders: Sequence[int] | None = None) -> Hooks:
    """Let a method drop vision tokens inside the language model of ``model``, and nothing else.

    Beside :func:`ocvtp.apply`, whichever is put on first; but use its ``inside``, which knows more of a call:
    the prompt of assisted generation, and what can't work. Not beside ``weigh=True``.

    Args:
        model: a ``...ForConditionalGeneration``; or a language model, whose vision tokens
            ``hooks.expecting(vision=...)`` tells.
        method: settings of ``ocvtp.methods.in_llm``, or any other :class:`~ocvtp.methods.in_llm.Method`.
        placeholders: ids of vision tokens; default: what the model's configuration says.

    Raises:
        PatchError: a method is on already.
        ValueError: one that can't work on this model.
    """
    if hooks_of(model) is not None:
        raise PatchError(
            f"{hooks_of(model).method.name} drops tokens inside this model already: take it off first"
        )
    if placeholders is None:
        found = (getattr(getattr(model, "config", None), name, None) for name in _IDS)
        placeholders = sorted({one for one in found if isinstance(one, int)})
    made = Hooks(model, method, placeholders)
    model.__dict__[_ATTRIBUTE] = made
    return made


def uninstall(model: Any) -> None:
    """Take a method off; does nothing where there is none."""
    hooks = model.__dict__.pop(_ATTRIBUTE, None)
    if hooks is not None:
        hooks.remove()


def hooks_of(model: Any) -> Any:
    """The :class:`~ocvtp.vlm.in_llm.hooks.Hooks` on a model, or ``None``."""
    return model.__dict__.get(_ATTRIBUTE)


def settle(model: Any, method: Method | None, placeholders: Sequence[int]) -> None:
    """What a patch's settings ask for: put on, exchanged or taken off.

    Hooks that :func:`install` put on stay where none are asked for.

    Raises:
        PatchError, ValueError: as :func:`install`; nothing has changed then.
    """
    there = hooks_of(model)
    if there is not None and not there.owned:
        if method is not None:
            raise PatchError("in_llm.install put hooks on this model: in_llm.uninstall(model) first")
        return
    if there is not None and there.method == method and there.placeholders == tuple(placeholders):
        return
    made = None if method is None else Hooks(model, method, placeholders)
    uninstall(model)
    if made is not None:
        made.owned = True
        model.__dict__[_ATTRIBUTE] = made
