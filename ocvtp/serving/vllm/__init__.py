"""A plug-in with which vLLM serves pruned models: twins of its own architectures, chosen per run.

vLLM's models run as they are. Hooks read what passes their vision tower, the rest of this package's selection
says which rows stay, and the others never become tokens of a prompt. Nothing of vLLM is imported before vLLM
loads this.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Make the twins known to vLLM, which calls this in every process. Imports no model.

    Never raises: vLLM would start no model at all, pruned or not. Calling it again changes nothing.
    """
    try:
        from vllm import ModelRegistry

        from ocvtp.serving.vllm.twins import PREFIX, TWINS

        for twin in TWINS.values():
            ModelRegistry.register_model(PREFIX + twin.architecture, twin.where)
    except Exception:
        logging.getLogger("ocvtp").exception("ocvtp's models are not available in this vLLM")
