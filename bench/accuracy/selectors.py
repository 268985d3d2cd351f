"""Everybody who chooses tokens here, under one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.accuracy.standing import BEFORE, BOTH, MODES, PLAIN, Mode
from bench.accuracy.testset import TestSet
from ocvtp import OCPruner, Selection, methods
from ocvtp.pruner.topup import Fill

#: Refinement rounds of our pruner; none is the published rule.
ROUNDS = (0, 1)
#: Draws of random tokens. Ours draws the noise of its slots once: what it gains or loses by chance shows
#: between its two trainings.
SEEDS = 5
_BATCH = 50
#: Modes of most; where the mean is taken is measured with the best few.
_MODES = tuple(mode for mode in MODES if mode != BEFORE)


@dataclass(frozen=True)
class Selector:
    """Chooses tokens of test pictures.

    Attributes:
        name: in tables.
        choose: of pictures, a budget and a seed: ``[P, keep]`` indices.
        seeds: draws that differ.
        group: lines of one name and several groups are one method trained several times.
        pruner: if it is ours.
        options: that the pruner takes besides.
        modes: in which it is measured.
    """

    name: str
    choose: Callable[[TestSet, int, int], torch.Tensor]
    seeds: int = 1
    group: str = ""
    pruner: OCPruner | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[Mode, ...] = _MODES


def rivals(layer: int) -> list[Selector]:
    """Without training; those that compare features read the pruner's layer, or the consumed one."""

    def reading(early: bool) -> list[Selector]:
        def by_features(name: str, select: Callable[[torch.Tensor, int], Selection]) -> Selector:
            def choose(test: TestSet, keep: int, seed: int) -> torch.Tensor:
                return select(test.layers[layer] if early else test.tokens, keep).indices

            if early:
                return Selector(name, choose)
            return Selector(in_consumed(name), choose, modes=tuple(MODES))

        return [
            by_features("farthest point", methods.farthest_point),
            by_features("k-medoids", methods.k_medoids),
            by_features("greedy DPP", methods.greedy_dpp),
        ]

    return [
        Selector("random", _random, seeds=SEEDS),
        Selector("uniform grid", lambda t, keep, _: methods.grid(t.tokens, keep, shape=t.shape).indices),
        Selector("attention top-k", lambda t, keep, _: methods.attention_top_k(t.received, keep).indices),
        *reading(early=True),
        *reading(early=False),
    ]


def _random(test: TestSet, keep: int, seed: int) -> torch.Tensor:
    return methods.random_tokens(test.tokens, keep, seed=seed * len(test)).indices


def ours(pruners: Mapping[str, OCPruner]) -> list[Selector]:
    """Each pruner of an early layer as published, and with rounds of refinement."""
    return [
        _ours(
            ours_name(rounds),
            group,
            pruner,
            {"refine": rounds},
            tuple(MODES) if rounds == 0 else (PLAIN, BOTH),
        )
        for rounds in ROUNDS
        for group, pruner in pruners.items()
    ]


def ours_consumed(pruners: Mapping[str, OCPruner]) -> list[Selector]:
    """Each pruner of the consumed layer, topped up by farthest points, and as published."""
    ways: dict[str, tuple[Fill, tuple[Mode, ...]]] = {
        in_consumed("ours"): ("farthest_point", tuple(MODES)),
        in_consumed(ours_name(0)): ("attention", _MODES),
    }
    return [
        _ours(name, group, pruner, {"fill": fill}, modes)
        for name, (fill, modes) in ways.items()
        for group, pruner in pruners.items()
    ]


def _ours(
    name: str, group: str, pruner: OCPruner, options: Mapping[str, Any], modes: tuple[Mode, ...]
) -> Selector:
    def choose(test: TestSet, keep: int, seed: int) -> torch.Tensor:
        x, scores = test.layers[pruner.config.layer], test.received
        parts = [
            pruner(x[i : i + _BATCH], keep, scores[i : i + _BATCH], seed=seed, **options).indices
            for i in range(0, len(x), _BATCH)
        ]
        return torch.cat(parts)

    return Selector(name, choose, group=group, pruner=pruner, options=options, modes=modes)


def ours_name(rounds: int) -> str:
    """In tables."""
    return "ours, as published" if rounds == 0 else f"ours, {rounds} round{'s' * (rounds > 1)}"


def in_consumed(name: str) -> str:
    """In tables, of those who compare what the language model reads."""
    return f"{name}, consumed layer"
