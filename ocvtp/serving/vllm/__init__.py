"""A plug-in with which vLLM serves pruned models: twins of its own architectures, chosen per run.

vLLM's models run as they are. Hooks read what passes their vision tower, the rest of this package's selection
says which rows stay, and the others never become tokens of a prompt. Nothing of vLLM is imported before vLLM
loads this.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any


def register() -> None:
    """Make the twins known to vLLM, which calls this in every process. Imports no model.

    Never raises: vLLM would start no model at all, pruned or not. Calling it again changes nothing.
    """
    try:
        from vllm import ModelRegistry, __version__

        from ocvtp.serving.vllm.twins import PREFIX, TWINS

        # vLLM remembers on disk what it learned of a class, by this name and by the contents of this package:
        # that is why models come from here and not from their modules, and what the version is for.
        release = "".join(letter if letter.isalnum() else "_" for letter in __version__)
        for family, twin in TWINS.items():
            ModelRegistry.register_model(PREFIX + twin.architecture, f"{__name__}:{family}__{release}")
    except Exception:
        logging.getLogger("ocvtp").exception("ocvtp's models are not available in this vLLM")


def __getattr__(name: str) -> Any:
    """The model that :func:`register` has named so."""
    from ocvtp.serving.vllm.twins import TWINS

    family, _, release = name.partition("__")
    if family not in TWINS or not release:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(TWINS[family].module).Model
