"""Token pruning for Hugging Face vision-language models: a patch on one instance, put on and taken off.

ocvtp.apply(model, pruner, keep=64)
model.generate(**inputs)
ocvtp.remove(model)
"""

from __future__ import annotations

from ocvtp.vlm.call.columns import lengthen
from ocvtp.vlm.call.counting import PromptTokens, count_prompt_tokens, kept_columns
from ocvtp.vlm.contracts.errors import PatchError, UnsupportedModelError
from ocvtp.vlm.patch import apply, pruned, remove, select
from ocvtp.vlm.report import PruneReport
from ocvtp.vlm.stage_times import stage_times

__all__ = [
    "PatchError",
    "PromptTokens",
    "PruneReport",
    "UnsupportedModelError",
    "apply",
    "count_prompt_tokens",
    "kept_columns",
    "lengthen",
    "pruned",
    "remove",
    "select",
    "stage_times",
]
