"""What dropping tokens inside the language model asks of the rest: settings, reasons, lines of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ocvtp.methods.in_llm import Inside, Method, averages, by_name
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.contracts.selector import Begun, Group
from ocvtp.vlm.in_llm import fit, hooks_of
from ocvtp.vlm.in_llm.decoder import Decoder
from ocvtp.vlm.options import Options

#: Why kept tokens have no weights then.
NO_WEIGHTS = (
    "weights of kept tokens are by the columns of the prompt, and layers behind a cut inside hold fewer: use "
    "weigh=False"
)


@dataclass(frozen=True)
class Everything:
    """Nobody chooses before the language model."""

    name: str = "nobody"
    read_layer: int | None = None
    reads_scores: bool = False

    def begin(
        self,
        group: Group,
        features: torch.Tensor | None,
        device: torch.device,
        *,
        return_attention: bool = False,
    ) -> Begun:
        """Nobody asks."""
        raise PatchError("nothing is chosen before the language model: ocvtp.apply(model, None, ...)")

    def beside(self, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]) -> None:
        """Nothing runs beside the tower."""

    def close(self) -> None:
        """It holds nothing."""


ALL = Budget(1.0)


def named(adapter: Adapter, options: Options) -> Options:
    """The same with the method inside that ``pruner`` names, fitted to ``keep``; others as they are.

    Raises:
        TypeError, ValueError: options that mean nothing then, or a budget that can't be had.
    """
    name: Any = options.pruner
    if isinstance(name, torch.nn.Module) or name not in get_args(Inside):
        return options
    for said in options.said():
        if said not in ("keep", "backend"):
            raise ValueError(f"{said} is for what is dropped before the language model, not for {name!r}")
    tokens = adapter.facts({}).tokens
    if tokens is None and not isinstance(options.keep, float):
        raise ValueError(
            f"images of this model differ in size, so keep of {name!r} must be a share, such as 0.222; "
            f"got {options.keep!r}"
        )
    keep: Any = options.keep
    depth = Decoder(adapter.model).depth
    method = by_name(name, keep, depth=depth, tokens=tokens)
    return Options(None, inside=method, backend=options.backend)


def check_inside(adapter: Adapter, method: Method) -> None:
    """Raise ``ValueError`` for a method that can't work on a model, ``PatchError`` where another is on."""
    fit(adapter.model, method)
    there = hooks_of(adapter.model)
    if there is not None and not there.owned:
        raise PatchError("in_llm.install put hooks on this model: in_llm.uninstall(model) first")


def described(adapter: Adapter, method: Method, tokens: int | None) -> tuple[str, ...]:
    """Lines of the report.

    Args:
        adapter: of the model.
        method: that drops tokens.
        tokens: vision tokens that one image leaves the language model, if all leave as many.
    """
    decoder, numbering = fit(adapter.model, method)
    where = ", ".join(str(cut) for cut in method.cuts)
    lines = [f"{method.name} before layer{'s' * (len(method.cuts) > 1)} {where}, positions {numbering}"]
    if tokens is not None:
        found = averages(method, depth=decoder.depth, tokens=tokens)
        steps = " -> ".join(str(one) for one in (tokens, *found.nominal))
        lines.append(
            f"of one image {steps}; its {decoder.depth} layers get {found.entering:.1f} on average "
            f"({found.entering / tokens:.1%}), {found.leaving:.1f} leave them"
        )
    if decoder.mrope and method.adaptation is not None:
        lines.append(f"(on {adapter.model.config.model_type} our adaptation: {method.adaptation})")
    return tuple(lines)
