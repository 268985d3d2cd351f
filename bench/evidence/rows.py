"""How well kept tokens stand for all: every selector at every budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.evidence.selectors import DRAWN, PUBLISHED, RIVALS, VARIANTS, Choice
from bench.evidence.views import Views
from ocvtp import OCPruner, metrics

#: Shares of the tokens that are kept, in percent.
BUDGETS = (5, 11, 22, 33)
#: Of whatever draws at random: random tokens, and the noise of the slots of one pruner.
SEEDS = 5
#: Variants of every pruner; the others are remedies, tried on one.
ALWAYS = (PUBLISHED, "+ 1 round")


@dataclass(frozen=True)
class Row:
    """One selector at one budget, averaged over all crops.

    Errors are in units of the features' variance within the image; lower is better.

    Attributes:
        method: its name.
        pruner: whose tokens, or ``None`` for a selector without training.
        percent, keep: the budget.
        seeds: draws averaged over.
        coverage_read: mean squared distance to the nearest kept token, of features read.
        coverage_consumed: the same of features consumed.
        residual_read: squared residual after projection on the span of the kept tokens, of features read; of
            the first draw, for it takes long.
        residual_consumed: the same of features consumed.
        spread_read, spread_consumed: standard deviation of the coverages over seeds; 0 for one.
        live: slots that own a token.
        distinct: kept tokens that are some slot's own choice.
    """

    method: str
    pruner: str | None
    percent: int
    keep: int
    seeds: int
    coverage_read: float
    coverage_consumed: float
    residual_read: float
    residual_consumed: float
    spread_read: float
    spread_consumed: float
    live: float | None
    distinct: float | None


Chooser = Callable[[Views, torch.Tensor, int, int], Choice]
"""Of views, features read, a budget and a seed."""


def keep_of(percent: int, tokens: int) -> int:
    """Tokens that a budget is."""
    return max(1, round(percent / 100 * tokens))


def measure(
    name: str, choose: Chooser, views: Views, layer: int, percent: int, *, pruner: str | None = None,
    seeds: int = 1, reads: int | None = None,
) -> Row:  # fmt: skip
    """One row.

    Args:
        name: of the method.
        choose: the method.
        views: of crops held out.
        layer: whose output "features read" are, for every row alike.
        percent: the budget.
        pruner: its name, if it is a pruner's.
        seeds: draws.
        reads: the layer it reads itself; default: ``layer``.
    """
    keep = keep_of(percent, views.consumed.shape[1])
    reads = layer if reads is None else reads
    drawn = [choose(views, views.layers[reads], keep, seed) for seed in range(seeds)]
    seen = views.layers[layer], views.consumed
    each = [[_mean(metrics.coverage(x, one.indices)) for x in seen] for one in drawn]
    coverage = torch.tensor(each, dtype=torch.float64)
    residual = [_mean(metrics.least_squares_residual(x, drawn[0].indices)) for x in seen]
    mean = coverage.mean(dim=0).tolist()
    spread = coverage.std(dim=0).tolist() if seeds > 1 else [0.0, 0.0]
    live, distinct = [one.live for one in drawn], [one.distinct for one in drawn]
    return Row(
        name,
        pruner,
        percent,
        keep,
        seeds,
        coverage_read=mean[0],
        coverage_consumed=mean[1],
        residual_read=residual[0],
        residual_consumed=residual[1],
        spread_read=spread[0],
        spread_consumed=spread[1],
        live=_mean_count(live),
        distinct=_mean_count(distinct),
    )


def _mean(values: torch.Tensor) -> float:
    return values.double().mean().item()


def _mean_count(counts: Sequence[torch.Tensor | None]) -> float | None:
    """``None`` for a selector without slots."""
    known = [count for count in counts if count is not None]
    return _mean(torch.stack(known)) if known else None


def all_rows(views: Views, layer: int, pruners: Mapping[str, OCPruner], remedied: str) -> list[Row]:
    """Rivals; every pruner as published, and with a round; all remedies at the pruner called ``remedied``."""
    rows = []
    for percent in BUDGETS:
        for name, rival in RIVALS.items():
            rows.append(measure(name, rival, views, layer, percent, seeds=SEEDS if name in DRAWN else 1))
        for pruner_name, pruner in pruners.items():
            for name, variant in VARIANTS.items():
                if pruner_name == remedied or name in ALWAYS:
                    choose = functools.partial(variant, pruner)
                    seeds = SEEDS if name in ALWAYS and pruner_name == remedied else 1
                    reads = pruner.config.layer
                    rows.append(
                        measure(
                            name, choose, views, layer, percent, pruner=pruner_name, seeds=seeds, reads=reads
                        )
                    )
    return rows
