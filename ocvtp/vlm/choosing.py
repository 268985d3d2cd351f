"""From options to who chooses."""

from __future__ import annotations

from typing import Any, get_args

import torch

from ocvtp.methods.in_llm import Inside
from ocvtp.pruner.capture import SlotRunner
from ocvtp.pruner.pruner import OCPruner
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.reducer import Reducer, Rival, Site
from ocvtp.vlm.contracts.selector import Rule, Selector, reads_features
from ocvtp.vlm.contracts.settings import Tower
from ocvtp.vlm.encode.selectors import PrunerSelector, RuleSelector
from ocvtp.vlm.insides import Everything
from ocvtp.vlm.options import Options
from ocvtp.vlm.rivals.catalog import bound, rival
from ocvtp_kernels._checks import as_int


def selector_for(options: Options, consumed: tuple[int, ...]) -> Selector:
    """Who chooses, by what was asked.

    Args:
        options: what was asked.
        consumed: encoder layers that the language model consumes.

    Raises:
        TypeError, ValueError: a pruner that is none, or options that mean nothing to it.
    """
    pruner: Any = options.pruner  # torch.nn.Module | Rule | None
    if pruner is None:
        return Everything()
    if not isinstance(pruner, torch.nn.Module) and pruner not in get_args(Rule):
        known = ", ".join(f'"{name}"' for name in (*get_args(Rule), *get_args(Rival), *get_args(Inside)))
        raise TypeError(f"pruner must be an ocvtp.OCPruner or one of {known}; got {pruner!r}")
    compares = isinstance(pruner, str) and reads_features(pruner)
    if options.fill != "auto" and isinstance(pruner, str):
        raise ValueError(f"fill is for pruners, whose slots may be too few, not for {pruner!r}")
    if options.features != "auto" and not compares:
        who = repr(pruner) if isinstance(pruner, str) else "a pruner, which reads the layer it was trained on"
        raise ValueError(f"features is for rules that compare features, not for {who}")
    if not isinstance(pruner, torch.nn.Module):
        if reads_features(pruner):
            layer = _read_layer(options.features, consumed, options.tower)
            return RuleSelector(
                pruner,
                read_layer=layer,
                rounds=options.refine,
                backend=options.backend,
                on_invalid=options.on_invalid,
            )
        if options.refine:
            raise ValueError(f"refine needs features; {pruner!r} reads none")
        return RuleSelector(pruner, options.seed, on_invalid=options.on_invalid)
    passed: dict[str, Any] = {
        "seed": options.seed,
        "backend": options.backend,
        "precision": options.precision,
    }
    if options.refine:
        passed["refine"] = options.refine
    if options.on_invalid != "raise":
        passed["on_invalid"] = options.on_invalid
    config: Any = pruner.config
    fill = options.fill
    if fill == "auto":  # a module that is called like a pruner need not know of it
        late = isinstance(pruner, OCPruner) and config.layer == max(consumed)
        fill = "farthest_point" if late else "attention"
    if fill != "attention":
        passed["fill"] = fill
    return PrunerSelector(
        pruner, passed, SlotRunner(bool(options.capture)), options.max_error, reads_scores=fill == "attention"
    )


def reducer_for(options: Options, adapter: Adapter) -> Reducer | None:
    """The rival method that was asked for, made up for a model; ``None`` if none was.

    Args:
        options: what was asked.
        adapter: of the model.

    Raises:
        ValueError: a method that can't work on this model, or options that mean nothing to it.
    """
    asked: Any = options.pruner
    if not isinstance(asked, Reducer):
        if isinstance(asked, torch.nn.Module) or asked not in get_args(Rival):
            return None
        asked = rival(asked)
    for name in options.said():
        if name in ("fill", "features", "refine", "on_invalid"):
            raise ValueError(f"{name} is for pruners and rules of our own, not for {asked.title}")
    if options.tower == "kept_rows" and asked.reads_rows:
        raise ValueError(
            f'tower="kept_rows" computes the consumed layer for kept tokens only, and {asked.title} compares '
            'all of it: use tower="exact"'
        )
    if asked.merges and (options.merge not in ("auto", "off") or options.weigh is True):
        raise ValueError(f"{asked.title} merges tokens by its own rule: leave out merge and weigh")
    facts = adapter.facts({})
    site = Site(
        family=adapter.model.config.model_type,
        class_token=adapter.class_token,
        consumed=facts.consumed_layers,
        num_layers=facts.num_layers,
        blocks=adapter.told_blocks,
        tokens=facts.tokens,
        square=not hasattr(adapter.layout, "shape") or adapter.layout.shape({}) is not None,
        extra_rows=facts.extra_rows,
        model=adapter.model,
    )
    method = bound(asked, site)
    keep = None if facts.tokens is None else Budget(options.keep).of(facts.tokens)
    if isinstance(keep, int) and facts.tokens is not None and keep < facts.tokens:
        method.check(keep, site)
    return method


def _read_layer(features: object, consumed: tuple[int, ...], tower: Tower) -> int:
    """The layer whose features a rule compares.

    Raises:
        TypeError, ValueError: none of the tower, or one that is computed too late.
    """
    if features == "early" or (features == "auto" and tower == "kept_rows"):
        layer: int | None = _early(consumed)
    elif features in ("auto", "consumed"):
        layer = max(consumed)
    else:
        layer = as_int(features)
        if layer is None:
            raise TypeError(
                f'features must be "early", "consumed", "auto" or an encoder layer, an int; got {features!r}'
            )
        if not 0 <= layer <= max(consumed):
            raise ValueError(
                f"features must be between 0 and {max(consumed)}, the deepest encoder layer that the "
                f"language model consumes; got {layer}"
            )
    assert layer is not None
    return layer


def _early(consumed: tuple[int, ...]) -> int:
    """A layer as far up as the published pruner's, which reads 8 where LLaVA-1.5 consumes 22."""
    return round(max(consumed) * 8 / 22)
