"""From options to settings that are known to work on a model, and a report."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from ocvtp.pruner.pruner import OCPruner
from ocvtp.vlm.call.handover import route_of
from ocvtp.vlm.call.weighing import why_no_weights
from ocvtp.vlm.capturing import graphs_for
from ocvtp.vlm.choosing import reducer_for, selector_for
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.fit import check_fit
from ocvtp.vlm.contracts.layout import TowerFacts
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.selector import Selector
from ocvtp.vlm.contracts.settings import Layout, Merge, Positions, Settings
from ocvtp.vlm.contracts.versions import transformers_older_than
from ocvtp.vlm.encode.selectors import PrunerSelector
from ocvtp.vlm.insides import ALL, NO_WEIGHTS, check_inside, described, named
from ocvtp.vlm.options import Options
from ocvtp.vlm.report import PruneReport
from ocvtp_kernels._backend import resolve_backend


def resolve(adapter: Adapter, options: Options) -> tuple[Settings, PruneReport]:
    """Check everything before anything is changed.

    Raises:
        TypeError, ValueError: a pruner or an option that does not fit, or that this machine can't serve.
        BackendUnavailableError: an explicit backend that can't run here.
    """
    options = named(adapter, options)
    facts, model = adapter.facts({}), adapter.model
    budget = Budget(options.keep, options.max_error, options.budgets) if options.pruner is not None else ALL
    if options.inside is not None:
        check_inside(adapter, options.inside)
    if isinstance(options.pruner, torch.nn.Module):
        config: Any = getattr(options.pruner, "config", None)
        if not hasattr(config, "in_dim") or not hasattr(config, "layer"):
            raise TypeError(f"pruner must be an ocvtp.OCPruner; got {type(options.pruner).__name__}")
        check_fit(config, facts, model.config._name_or_path or "MODEL")
    reducer = reducer_for(options, adapter)
    selector = selector_for(options, facts.consumed_layers) if reducer is None else reducer
    if options.tower == "kept_rows" and selector.read_layer == max(facts.consumed_layers):
        raise ValueError(
            f'{_KEPT_ROWS}, and tokens are chosen by all of it: use features="early", or a pruner trained on '
            "an earlier layer"
        )
    merge, no_merge = _merge(adapter, options, selector)
    weigh, no_weights = _weigh(adapter, options, selector)
    settings = Settings(
        selector=selector,
        budget=budget,
        positions=_positions(adapter, options.positions),
        backend=options.backend,
        route=route_of(model),
        attention=str(model.config.get_text_config()._attn_implementation),
        layout=_layout(adapter, options, selector),
        newlines=options.newlines,
        frames=options.frames,
        tower=options.tower,
        columns=options.columns,
        merge=merge,
        weigh=weigh,
        before=options.pruner is not None,
        inside=options.inside,
        graphs=graphs_for(adapter, options, selector, facts.device),
    )
    _check_columns(selector, settings)
    if adapter.needs_mm_route and settings.route == "inputs_embeds":
        raise ValueError(f"pruning {model.config.model_type} needs transformers >= 5.18")
    adapter.check(settings)
    reasons = tuple(reason for reason in (no_merge, no_weights) if reason is not None)
    return settings, _report(adapter, facts, options, settings, reasons)


def _check_columns(selector: Selector | Reducer, settings: Settings) -> None:
    """Raise ``ValueError`` where rows are handed over in an order that no column tells of."""
    if not isinstance(selector, Reducer) or not selector.merges or selector.in_raster:
        return
    if settings.columns and settings.positions == "compact":
        raise ValueError(
            f"{selector.title} hands its rows over in an order of its own, of which columns say nothing: use "
            'positions="original", which leaves rows at their places, or columns=False'
        )


_KEPT_ROWS = 'tower="kept_rows" computes the consumed layer for kept tokens only'


def _layout(adapter: Adapter, options: Options, selector: Selector | Reducer) -> Layout:
    """Of tiled images; rival methods choose tile by tile, among all tokens, as their authors do.

    Raises:
        ValueError: options that this leaves no room for.
    """
    if "layout" not in adapter.layout.options or not isinstance(selector, Reducer):
        return options.layout
    if options.positions == "original":
        raise ValueError(
            f"{selector.title} chooses among all tokens of all tiles, padding too, which has no position in "
            'the long prompt: use positions="compact" or "auto"'
        )
    if options.newlines != "last":
        raise ValueError(f"{selector.title} puts all tiles' tokens together, with one newline behind them")
    return "official"


def _merge(adapter: Adapter, options: Options, selector: Selector | Reducer) -> tuple[Merge, str | None]:
    """Where rows are averaged, and why not where ``"auto"`` would. Rivals are as published, unless asked."""
    if options.pruner is None or (options.merge == "auto" and isinstance(selector, Reducer)):
        return "off", None
    kept_rows = f"{_KEPT_ROWS}, so others can't be averaged"
    if options.merge == "auto":
        return ("off", kept_rows) if options.tower == "kept_rows" else ("projected", None)
    if options.merge != "off" and options.tower == "kept_rows":
        raise ValueError(f'{kept_rows}: use tower="exact", or merge="off"')
    if options.merge == "features" and not adapter.projects_tokens:
        raise ValueError(
            f"the projector of {adapter.model.config.model_type} doesn't take tokens one by one, so their "
            'means can\'t be taken before it: use merge="projected"'
        )
    return options.merge, None


def _weigh(adapter: Adapter, options: Options, selector: Selector | Reducer) -> tuple[bool, str | None]:
    """Whether the language model is told masses, and why not where ``"auto"`` would."""
    published = options.weigh == "auto" and isinstance(selector, Reducer)
    if options.weigh is False or options.pruner is None or published:
        return False, None
    reason = why_no_weights(adapter.model) if options.inside is None else NO_WEIGHTS
    if reason is None and options.tower == "kept_rows":
        reason = f'{_KEPT_ROWS}, so nobody knows for whom they stand: use tower="exact"'
    if reason is not None and options.weigh is True:
        raise ValueError(f"weigh=True is not possible here: {reason}; or weigh=False")
    return reason is None, reason


def _report(
    adapter: Adapter, facts: TowerFacts, options: Options, settings: Settings, reasons: tuple[str, ...]
) -> PruneReport:
    keep = settings.budget.of(facts.tokens) if facts.tokens is not None else None
    return PruneReport(
        family=adapter.model.config.model_type,
        selector=_name(settings.selector),
        tower=facts.tower,
        read_layer=settings.selector.read_layer,
        consumed_layers=facts.consumed_layers,
        num_layers=facts.num_layers,
        attention=facts.attention,
        backend=_backend(adapter.model, options, facts.device),
        precision=_precision(options, facts.device),
        captured=settings.graphs is not None or _captured(settings.selector, options, facts.device),
        vision_captured=settings.graphs is not None,
        refine=options.refine,
        keep=str(settings.budget),
        unit=facts.unit,
        tokens_before=None if facts.tokens is None else facts.tokens + facts.extra_rows,
        tokens_after=(after := keep + facts.extra_rows if isinstance(keep, int) else None),
        positions=settings.positions,
        route=settings.route,
        kept_rows_only=settings.tower == "kept_rows",
        merge=settings.merge,
        weigh=settings.weigh,
        farthest=isinstance(settings.selector, PrunerSelector) and not settings.selector.reads_scores,
        reasons=reasons,
        method=settings.selector.account if isinstance(settings.selector, Reducer) else None,
        own_merge=isinstance(settings.selector, Reducer) and settings.selector.merges,
        before=options.pruner is not None,
        inside=() if options.inside is None else described(adapter, options.inside, after),
    )


def _name(selector: Selector | Reducer) -> str:
    return selector.title if isinstance(selector, Reducer) else selector.name


def _captured(selector: Selector | Reducer, options: Options, device: torch.device) -> bool:
    """Whether a CUDA graph is replayed. Not by rules, and not where farthest points read the whole map."""
    able = isinstance(selector, PrunerSelector) and selector.reads_scores
    return able and bool(options.capture) and device.type == "cuda"


def _backend(model: Any, options: Options, device: torch.device) -> Literal["triton", "torch"]:
    """Of the operations that read what the model computes.

    Raises:
        BackendUnavailableError: an explicit backend that can't run there, or not in the model's dtype.
    """
    why = "it takes up to 32 bits, and the model is float64" if model.dtype == torch.float64 else None
    return resolve_backend(options.backend, "received_attention", device, lambda: why)


def _precision(options: Options, device: torch.device) -> str:
    """What the pruner's products will be computed in.

    Raises:
        ValueError: a precision that can't be had on this device.
        BackendUnavailableError: an explicit backend that can't run there.
    """
    if not isinstance(options.pruner, OCPruner):
        return options.precision
    _, dtype, tf32 = options.pruner.arithmetic(device, options.backend, options.precision)
    return "tf32" if tf32 else {torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, "fp64")


def _positions(adapter: Adapter, positions: str) -> Positions:
    if positions not in (*get_args(Positions), "auto"):
        raise ValueError(f'positions must be "compact", "original" or "auto"; got {positions!r}')
    if adapter.mrope:
        if positions == "compact":
            raise ValueError(
                f"{adapter.model.config.model_type} has positions in three dimensions, which can't be "
                'renumbered: use positions="original" or "auto"'
            )
        return "original"
    if positions != "original":
        return "compact"
    if transformers_older_than("5.10"):
        raise ValueError(
            'positions="original" needs transformers >= 5.10: older ones number generated tokens by the '
            "attention mask, whatever the prompt's positions"
        )
    return "original"
