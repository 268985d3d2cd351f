"""What the gate compares: selectors of this benchmark, and what a user passes to have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.accuracy.selectors import Selector, in_consumed
from bench.accuracy.standing import BOTH, MODES, PLAIN, Mode
from bench.accuracy.testset import TestSet
from bench.evidence.selectors import CONVERGED
from ocvtp import OCPruner
from ocvtp.vlm.contracts.selector import Rule

_KEEP = 28
_OTHERS = (13, 56, 84)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        selector: of this benchmark.
        pruner: what :func:`ocvtp.apply` takes for it, a pruner or a rule.
        keep: the budget.
        mode: what kept tokens stand for.
        options: what else :func:`ocvtp.apply` takes.
    """

    selector: Selector
    pruner: OCPruner | Rule
    keep: int
    mode: Mode = PLAIN
    options: dict[str, Any] = field(default_factory=dict)


def cases(test: TestSet, selectors: Sequence[Selector], layer: int) -> list[Case]:
    """Every selector that the product has, plain and in all its modes; other budgets where it is ours.

    Args:
        test: whose tokens are kept.
        selectors: of this benchmark.
        layer: that rules of an early layer read.
    """
    everything = Selector("all tokens", lambda t, keep, _: torch.arange(keep).expand(len(t), -1))
    found = [Case(everything, "grid", test.tokens.shape[1], mode) for mode in MODES]
    rules: dict[str, tuple[Rule, dict[str, Any]]] = {
        "uniform grid": ("grid", {}),
        "attention top-k": ("attention", {}),
    }
    for where, name in ((layer, str), ("consumed", in_consumed)):
        rules |= {
            name("farthest point"): ("farthest_point", {"features": where}),
            name("k-medoids"): ("farthest_point", {"features": where, "refine": CONVERGED}),
            name("greedy DPP"): ("greedy_dpp", {"features": where}),
        }
    for selector in selectors:
        if selector.pruner is not None:
            pruner: OCPruner | Rule = selector.pruner
            options = dict(selector.options)
        elif selector.name in rules:
            pruner, options = rules[selector.name]
        else:
            continue
        found += [Case(selector, pruner, _KEEP, mode, options) for mode in selector.modes]
        if selector.pruner is not None and not options.get("refine"):
            found += [Case(selector, pruner, keep, BOTH, options) for keep in _OTHERS]
    return found
