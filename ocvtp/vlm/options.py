"""From what a user asked of :func:`ocvtp.apply` to settings that are known to work, and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ocvtp.pruner.capture import SlotRunner
from ocvtp.pruner.pruner import OCPruner, check_options
from ocvtp.pruner.topup import Fill
from ocvtp.vlm.call.handover import route_of
from ocvtp.vlm.call.weighing import why_no_weights
from ocvtp.vlm.contracts.adapter import Adapter, TowerFacts
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.selector import Rule, Selector, reads_features
from ocvtp.vlm.contracts.settings import Frames, Layout, Merge, Newlines, Positions, Settings, Tower
from ocvtp.vlm.contracts.versions import transformers_older_than
from ocvtp.vlm.encode.selectors import PrunerSelector, RuleSelector
from ocvtp.vlm.families.fit import check_fit
from ocvtp.vlm.report import PruneReport
from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import as_int
from ocvtp_kernels.coverage import check_rounds


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`ocvtp.apply`, where they are explained."""

    pruner: torch.nn.Module | Rule
    keep: int | float | Literal["auto"] = 64
    positions: Positions | Literal["auto"] = "auto"
    seed: int = 0
    backend: str = "auto"
    precision: str = "auto"
    capture: bool = True
    refine: int = 0
    max_error: float | None = None
    budgets: Sequence[int] | None = None
    layout: Layout = "layout"
    newlines: Newlines = "last"
    frames: Frames = "each"
    tower: Tower = "exact"
    columns: bool = False
    merge: Merge | Literal["auto"] = "auto"
    weigh: bool | Literal["auto"] = "auto"
    features: int | Literal["auto", "early", "consumed"] = "auto"
    fill: Fill | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, kind in (("layout", Layout), ("newlines", Newlines), ("frames", Frames), ("tower", Tower)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(f'"{value}"' for value in get_args(kind))
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")
        if self.fill not in (*get_args(Fill), "auto"):
            known = ", ".join(f'"{value}"' for value in get_args(Fill))
            raise ValueError(f'fill must be one of {known} or "auto"; got {self.fill!r}')
        if self.merge not in (*get_args(Merge), "auto"):
            known = ", ".join(f'"{value}"' for value in get_args(Merge))
            raise ValueError(f'merge must be one of {known} or "auto"; got {self.merge!r}')
        if not isinstance(self.weigh, bool) and self.weigh != "auto":
            raise ValueError(f'weigh must be True, False or "auto"; got {self.weigh!r}')
        if self.keep == "auto" and isinstance(self.pruner, str):
            raise ValueError(f'keep="auto" compares coverage, which needs a pruner, not {self.pruner!r}')


def resolve(adapter: Adapter, options: Options) -> tuple[Settings, PruneReport]:
    """Check everything before anything is changed.

    Raises:
        TypeError, ValueError: a pruner or an option that does not fit, or that this machine can't serve.
        BackendUnavailableError: an explicit backend that can't run here.
    """
    facts, model = adapter.facts({}), adapter.model
    budget = Budget(options.keep, options.max_error, options.budgets)
    options = dataclasses.replace(
        options,
        refine=check_rounds(options.refine),
        seed=check_options(options.seed, options.precision),
    )
    if isinstance(options.pruner, torch.nn.Module):
        config: Any = getattr(options.pruner, "config", None)
        if not hasattr(config, "in_dim") or not hasattr(config, "layer"):
            raise TypeError(f"pruner must be an ocvtp.OCPruner; got {type(options.pruner).__name__}")
        check_fit(config, facts, model.config._name_or_path or "MODEL")
    selector = _selector(options, facts.consumed_layers)
    if options.tower == "kept_rows" and selector.read_layer == max(facts.consumed_layers):
        raise ValueError(
            f'{_KEPT_ROWS}, and tokens are chosen by all of it: use features="early", or a pruner trained on '
            "an earlier layer"
        )
    merge, no_merge = _merge(adapter, options)
    weigh, no_weights = _weigh(adapter, options)
    settings = Settings(
        selector=selector,
        budget=budget,
        positions=_positions(adapter, options.positions),
        backend=options.backend,
        route=route_of(model),
        attention=str(model.config.get_text_config()._attn_implementation),
        layout=options.layout,
        newlines=options.newlines,
        frames=options.frames,
        tower=options.tower,
        columns=options.columns,
        merge=merge,
        weigh=weigh,
    )
    if adapter.needs_mm_route and settings.route == "inputs_embeds":
        raise ValueError(f"pruning {model.config.model_type} needs transformers >= 5.18")
    adapter.check(settings)
    reasons = tuple(reason for reason in (no_merge, no_weights) if reason is not None)
    return settings, _report(adapter, facts, options, settings, reasons)


_KEPT_ROWS = 'tower="kept_rows" computes the consumed layer for kept tokens only'


def _merge(adapter: Adapter, options: Options) -> tuple[Merge, str | None]:
    """Where rows are averaged, and why not where ``"auto"`` would."""
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


def _weigh(adapter: Adapter, options: Options) -> tuple[bool, str | None]:
    """Whether the language model is told masses, and why not where ``"auto"`` would."""
    if options.weigh is False:
        return False, None
    reason = why_no_weights(adapter.model)
    if reason is None and options.tower == "kept_rows":
        reason = f'{_KEPT_ROWS}, so nobody knows for whom they stand: use tower="exact"'
    if reason is not None and options.weigh is True:
        raise ValueError(f"weigh=True is not possible here: {reason}; or weigh=False")
    return reason is None, reason


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


def _selector(options: Options, consumed: tuple[int, ...]) -> Selector:
    pruner = options.pruner
    if not isinstance(pruner, torch.nn.Module) and pruner not in get_args(Rule):
        known = ", ".join(f'"{rule}"' for rule in get_args(Rule))
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
            return RuleSelector(pruner, read_layer=layer, rounds=options.refine, backend=options.backend)
        if options.refine:
            raise ValueError(f"refine needs features; {pruner!r} reads none")
        return RuleSelector(pruner, options.seed)
    passed: dict[str, Any] = {
        "seed": options.seed,
        "backend": options.backend,
        "precision": options.precision,
    }
    if options.refine:
        passed["refine"] = options.refine
    config: Any = pruner.config
    fill = options.fill
    if fill == "auto":  # a module that is called like a pruner need not know of it
        late = isinstance(pruner, OCPruner) and config.layer == max(consumed)
        fill = "farthest_point" if late else "attention"
    if fill != "attention":
        passed["fill"] = fill
    return PrunerSelector(
        pruner, passed, SlotRunner(options.capture), options.max_error, reads_scores=fill == "attention"
    )


def _early(consumed: tuple[int, ...]) -> int:
    """A layer as far up as the published pruner's, which reads 8 where LLaVA-1.5 consumes 22."""
    return round(max(consumed) * 8 / 22)


def _report(
    adapter: Adapter, facts: TowerFacts, options: Options, settings: Settings, reasons: tuple[str, ...]
) -> PruneReport:
    keep = settings.budget.of(facts.tokens) if facts.tokens is not None else None
    return PruneReport(
        family=adapter.model.config.model_type,
        selector=settings.selector.name,
        tower=facts.tower,
        read_layer=settings.selector.read_layer,
        consumed_layers=facts.consumed_layers,
        num_layers=facts.num_layers,
        attention=facts.attention,
        backend=_backend(adapter.model, options, facts.device),
        precision=_precision(options, facts.device),
        captured=_captured(settings.selector, options, facts.device),
        refine=options.refine,
        keep=str(settings.budget),
        unit=facts.unit,
        tokens_before=None if facts.tokens is None else facts.tokens + facts.extra_rows,
        tokens_after=keep + facts.extra_rows if isinstance(keep, int) else None,
        positions=settings.positions,
        route=settings.route,
        kept_rows_only=settings.tower == "kept_rows",
        merge=settings.merge,
        weigh=settings.weigh,
        farthest=isinstance(settings.selector, PrunerSelector) and not settings.selector.reads_scores,
        reasons=reasons,
    )


def _captured(selector: Selector, options: Options, device: torch.device) -> bool:
    """Whether a CUDA graph is replayed. Not by rules, and not where farthest points read the whole map."""
    able = isinstance(selector, PrunerSelector) and selector.reads_scores
    return able and options.capture and device.type == "cuda"


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
