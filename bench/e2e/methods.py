"""Who prunes: nobody, ocvtp with a pruner or a rule, or the published code's dataflow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import ocvtp
from bench.e2e.official import FAMILIES, OfficialDataflow
from bench.e2e.prompts import Inputs
from bench.e2e.watch import Watch, watched
from ocvtp import OCPruner
from ocvtp.methods.in_llm import Inside, averages, by_name
from ocvtp.methods.in_llm import Method as Inner
from ocvtp.vlm import PatchError, stage_times
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.encode.timing import Clock
from ocvtp.vlm.rivals.catalog import METHODS

UNPRUNED, OURS, OFFICIAL = "unpruned", "ocvtp", "official dataflow"
MERGED, WEIGHED = "ocvtp, merged", "ocvtp, merged and weighed"
#: What becomes of the tokens that our pruner drops.
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {"merge": "off", "weigh": False},
    MERGED: {"merge": "projected", "weigh": False},
    WEIGHED: {"merge": "projected", "weigh": True},
}
#: Name of a method -> the rule that it is. What it drops is thrown away, as in the papers.
RULES: dict[str, Rule] = {
    "greedy DPP": "greedy_dpp",
    "farthest point": "farthest_point",
    "attention": "attention",
    "random": "random",
}
#: Methods of others, as published. What reads the question compares it in the language model's space: a
#: model of random weights comes without a text tower.
RIVALS: dict[str, type[Reducer]] = {kind.title: kind for kind in METHODS.values()}
#: Methods inside the language model, whose budget is what goes into its layers on average.
INSIDES: dict[str, Inside] = {
    "FastV": "fastv",
    "DART": "dart",
    "PyramidDrop": "pyramiddrop",
    "SparseVLM": "sparsevlm",
}
#: All but those: whose language model is measured in every way. Theirs reads as many tokens, no others.
OWN = (UNPRUNED, *VARIANTS, OFFICIAL, *RULES)
NAMES = (*OWN, *RIVALS, *INSIDES)

Prepare = Callable[[Inputs, Clock | None], Inputs]


class Runner:
    """A model with a method at work.

    Args:
        model: as it runs now.
        prepare: makes of a processor's inputs what ``generate`` and ``forward`` are called with.
    """

    def __init__(self, model: Any, prepare: Prepare) -> None:
        self.model, self._prepare = model, prepare
        self._clock: Clock | None = None

    def generate(self, inputs: Inputs, **options: Any) -> Any:
        """``generate``, greedily, with more in its result than tokens."""
        given = self._prepare(inputs, self._clock)
        return self.model.generate(**given, do_sample=False, return_dict_in_generate=True, **options)

    def answer(self, inputs: Inputs, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, count]`` tokens, chosen greedily, and the first one's logits ``[B, V]``."""
        found = self.generate(inputs, max_new_tokens=count, output_logits=True)
        return found.sequences[:, -count:], found.logits[0]

    def forward(self, inputs: Inputs) -> Any:
        """The first token's logits ``[B, 1, V]``, and a filled cache."""
        with torch.no_grad():
            given = self._prepare(inputs, self._clock)
            return self.model(**given, use_cache=True, logits_to_keep=1)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Time the stages of one call in a block. They then follow one another, which they else need not."""
        self._clock = Clock()
        times = (
            stage_times(self.model) if is_patched(self.model) else contextlib.nullcontext(self._clock.times)
        )
        try:
            with watched(self.model) as watch, times as stages:
                yield watch
            watch.stages.update({name: ms for name, ms in stages.items() if ms})
        finally:
            self._clock = None


@dataclass(frozen=True)
class Method:
    """A way to run a model.

    Attributes:
        name: as it is recorded.
        keep: image tokens of each image that the language model sees.
        active: puts it on a model for the length of a ``with`` block.
        dropped: image tokens that layers of the language model don't get, on average, of those it reads.
    """

    name: str
    keep: int
    active: Callable[[], contextlib.AbstractContextManager[Runner]]
    dropped: float = 0.0


def methods(model: Any, pruner: OCPruner, keep: int, everything: int) -> dict[str, Method]:
    """All methods that can run this model, unpruned first.

    Args:
        model: unpatched; the methods share it, one at a time.
        pruner: for it.
        keep: tokens of each image.
        everything: tokens of an image, unpruned; 0 leaves out methods inside the language model.
    """

    def patched(name: str, chooser: Any, how: dict[str, Any]) -> Method:
        @contextlib.contextmanager
        def active() -> Iterator[Runner]:
            with ocvtp.pruned(model, chooser, keep=keep, **how):
                yield Runner(model, _as_given)

        return Method(name, keep, active)

    @contextlib.contextmanager
    def official() -> Iterator[Runner]:
        dataflow = OfficialDataflow(model, pruner, keep, tf32=next(model.parameters()).is_cuda)
        yield Runner(model, dataflow.prepare)

    found = [
        Method(UNPRUNED, everything, lambda: contextlib.nullcontext(Runner(model, _as_given))),
        *(patched(name, pruner, how) for name, how in VARIANTS.items()),
    ]
    if model.config.model_type in FAMILIES:
        found.append(Method(OFFICIAL, keep, official))
    found += [patched(name, rule, VARIANTS[OURS]) for name, rule in RULES.items()]
    family = model.config.model_type
    found += [
        patched(name, kind("language_model") if kind.reads_text else kind(), {})  # type: ignore[call-arg]
        for name, kind in RIVALS.items()
        if family in kind.families
    ]
    found += _inside(model, keep, everything)
    return {method.name: method for method in found}


def _inside(model: Any, keep: int, everything: int) -> Iterator[Method]:
    """Those of :data:`INSIDES` that can have this budget on this model, or none."""
    depth = model.config.get_text_config().num_hidden_layers
    if not everything:  # nobody knows
        return
    for title, name in INSIDES.items():
        try:
            settings = by_name(name, keep / everything, depth=depth)
        except ValueError:
            continue
        active = functools.partial(_pruned_inside, model, settings)
        entering = averages(settings, depth=depth, tokens=everything).entering
        yield Method(title, keep, active, everything - entering)


@contextlib.contextmanager
def _pruned_inside(model: Any, settings: Inner) -> Iterator[Runner]:
    with ocvtp.pruned(model, None, inside=settings):
        yield Runner(model, _as_given)


def default_variant(model: Any, pruner: OCPruner, keep: int) -> str:
    """Which of :data:`VARIANTS` this model runs as when nothing is said of dropped tokens."""
    with ocvtp.pruned(model, pruner, keep=keep) as report:
        options = {"merge": report.merge, "weigh": report.weigh}
    return next(name for name, how in VARIANTS.items() if how == options)


def is_patched(model: Any) -> bool:
    """Whether ocvtp is at work on a model."""
    try:
        controller_of(model)
    except PatchError:
        return False
    return True


def _as_given(inputs: Inputs, clock: Clock | None) -> Inputs:
    return inputs
