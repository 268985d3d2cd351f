"""Dropping vision tokens between the layers of a language model, by hooks that can be taken off.

:func:`ocvtp.apply` does it with ``inside``; here is what it puts on a model, for who wants nothing else.
"""

from __future__ import annotations

from ocvtp.vlm.in_llm.fitting import fit
from ocvtp.vlm.in_llm.installing import hooks_of, install, settle, uninstall

__all__ = ["fit", "hooks_of", "install", "settle", "uninstall"]
