"""Who answers for which kind of golden file: the part of its name before the first underscore.

A file of a kind that is not here is a failure, and so is a tensor that its check never looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.rivals.golden import Case
from bench.rivals.methods import (
    cdpruner,
    divprune,
    fastervlm,
    globalcom2,
    hiprune,
    prumerge,
    tome,
    trim,
    visionzip,
    vispruner,
)

SINGLE, DOUBLE = torch.float32, torch.float64


def _both(file: str, case: str) -> tuple[torch.dtype, ...]:
    return (SINGLE, DOUBLE)


def _compared(file: str, case: str) -> tuple[torch.dtype, ...]:
    """Float64 alone where copies of tokens are compared: products of equal float32 rows may differ."""
    return (DOUBLE,) if case in ("ties", "copies") else (SINGLE, DOUBLE)


@dataclass(frozen=True)
class Kind:
    """How files of one method are checked.

    Attributes:
        check: compares everything in a sub-case with what the product makes of its inputs.
        dtypes: the precisions that a sub-case of a file is given in.
    """

    check: Callable[[Case], None]
    dtypes: Callable[[str, str], tuple[torch.dtype, ...]] = _compared


KINDS: dict[str, Kind] = {
    "cdpruner": Kind(cdpruner.check),
    "divprune": Kind(divprune.check),
    "fastervlm": Kind(fastervlm.check),
    "globalcom2": Kind(globalcom2.check),
    "hiprune": Kind(hiprune.check, _both),
    "prumerge": Kind(prumerge.check),
    "tome": Kind(tome.check),
    "trim": Kind(trim.check, _both),
    "visionzip": Kind(visionzip.check),
    "vispruner": Kind(vispruner.check, vispruner.dtypes),
}

#: Kinds that :mod:`bench.rivals.in_llm` answers for.
IN_LLM = frozenset({"dart", "fastv", "pdrop", "sparsevlm1", "sparsevlm2"})

#: Files that others read: weights and what they made of an input.
INPUTS = frozenset({"tower_clip", "tower_qwen", "w64", "w128"})
