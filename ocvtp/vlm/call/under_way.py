"""What must stay on a model until calls are over: by whom it is held, and what follows when one lets go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch._guards import CompileContext

#: For whoever takes on, or lets go, what another thread may be taking off. A holder may go in the middle of
#: that, in the same thread.
lock = threading.RLock()


class UnderWay:
    """Objects that hold something while they live. True while there are any.

    Args:
        let_go: called when the last of them is gone; never while something compiles, which may have seen
            what is let go, and would look for it again.
    """

    def __init__(self, let_go: Callable[[], None]) -> None:
        self._let_go = let_go
        self._holders: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._holders)

    def hold(self, holder: object) -> None:
        """Until ``holder`` is gone, also if its call fails."""
        with lock:
            self._holders.add(id(holder))
        weakref.finalize(holder, self._gone, id(holder)).atexit = False

    def _gone(self, number: int) -> None:
        with lock:
            if _compiles():
                self.hold(_Garbage())
            self._holders.discard(number)
        if not self:
            self._let_go()


class _Garbage:
    """Gone when garbage is collected next."""

    def __init__(self) -> None:
        self._itself = self


def _compiles() -> bool:
    """Whether anything compiles; PyTorch before 2.13 tells of this thread alone."""
    return torch.compiler.is_compiling() or CompileContext.try_get() is not None
