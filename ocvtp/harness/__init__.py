"""Models pruned by ocvtp in lmms-eval: ``lmms-eval --model ocvtp --model_args pretrained=...,pruner=...``.

lmms-eval runs as it is, and finds this by the entry point ``lmms_eval.models``. Imported in every process of
lmms-eval where ocvtp is installed: it loads nothing before a model is asked for.
"""

from __future__ import annotations

import logging
from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval registers.

    Never raises: lmms-eval drops the models of every plug-in when one of them does.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        return [ModelManifest("ocvtp", chat_class_path=f"{__name__}.model.Ocvtp")]
    except Exception:
        logging.getLogger("ocvtp").exception("ocvtp is not available in this lmms-eval")
        return []
