"""FasterVLM: what the class token attends to most."""

from __future__ import annotations

from bench.rivals.golden import Case
from bench.rivals.methods.attention import class_row
from ocvtp import methods


def check(case: Case) -> None:
    """``fastervlm_tower``."""
    case.close("cls_scores", class_row(case, 22))
    case.same("kept", methods.attention_top_k(case["cls_scores"], case.params["T"]).indices)
