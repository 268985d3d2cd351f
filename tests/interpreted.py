"""Triton's interpreter, faster: it prepares Triton's language once a launch.

By itself it does so again at every call of a function on the device, which takes a third of all its time and
changes nothing: what it puts in the language's place is the same. What kernels compute is the same, too.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


class _Launch:
    """What a launch puts back when it is over."""

    def __init__(self, scope: Any, prepared: set[int]) -> None:
        self._scope, self._prepared = scope, prepared

    def restore(self) -> None:
        self._prepared.clear()
        self._scope.restore()


def prepare_once_a_launch() -> None:
    """From now on, in this process. Nothing happens in a version of Triton that puts nothing back."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare = interpreter._patch_lang
    prepared: set[int] = set()  # namespaces of functions, in the launch that runs

    def once_a_launch(function: Any) -> Any:
        namespace = id(function.__globals__)
        if namespace in prepared:
            return interpreter._LangPatchScope()
        scope = prepare(function)
        prepared.add(namespace)
        return _Launch(scope, prepared)

    interpreter._patch_lang = once_a_launch
