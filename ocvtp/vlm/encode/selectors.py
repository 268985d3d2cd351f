"""Those who choose: an object-centric pruner, or a rule that needs no training."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ocvtp.methods import attention_top_k, greedy_dpp, grid, k_medoids, random_tokens
from ocvtp.pruner import OCPruner
from ocvtp.pruner.capture import SlotRunner
from ocvtp.selection import Selection
from ocvtp.vlm.contracts.selector import Begun, Group, Rule, Started, reads_features
from ocvtp.vlm.contracts.weights import inside, is_minded
from ocvtp.watch import OnInvalid
from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels.coverage import refine
from ocvtp_kernels.selection import gather_tokens

_moving = threading.Lock()


class Home:
    """Where one model needs a pruner, which follows it there.

    One pruner can serve several models, but only on one device: between two it would move at every call, have
    its weights folded anew each time, and be taken away from calls under way.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def __reduce__(self) -> tuple[type[Home], tuple[()]]:
        """Copies have a pruner of their own."""
        return type(self), ()

    def move(self, module: torch.nn.Module, device: torch.device) -> None:
        """Move a module unless it is there: the vision tower may have moved since the last call.

        Raises:
            ValueError: another model took it away, while this one stayed where it was.
        """
        settled = self._device == device or torch.compiler.is_compiling()  # which can't trace what follows
        if settled and not _is_elsewhere(module, device):
            return
        with _moving:  # another thread may be half-way
            others = _homes.setdefault(module, weakref.WeakSet())
            others.add(self)
            if _is_elsewhere(module, device):
                taken = next((p.device for p in module.parameters() if p.device != device), device)
                if self._device == device and any(
                    other is not self and other._device == taken for other in others
                ):
                    raise ValueError(
                        f"one pruner can't serve models on {device} and {taken}: it would move at every "
                        "call. Apply a copy, copy.deepcopy(pruner), to one of them"
                    )
                module.to(device)
            self._device = device

    def leave(self, module: torch.nn.Module) -> None:
        """It is not needed any more."""
        with _moving:
            if module in _homes:
                _homes[module].discard(self)
            self._device = None


_homes: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakSet[Home]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Later:
    """A choice that can't start before there are fill scores."""

    run: Callable[..., Selection]

    def get(self) -> Later:
        """See :class:`Begun`."""
        return self

    def select(self, fill_scores: torch.Tensor | None) -> Selection:
        """See :class:`Choice`."""
        with torch.no_grad():  # torch.compile can't trace a decorated method of what it made itself
            return self.run(fill_scores=fill_scores)

    def select_rows(
        self, fill_scores: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[Selection, torch.Tensor]:
        """See :class:`Choice`."""
        selection = self.select(fill_scores)
        return selection, gather_tokens(x, selection.indices.to(x.device))


@dataclass(frozen=True)
class PrunerSelector:
    """An :class:`~ocvtp.OCPruner`, or a module that is called like one.

    Attributes:
        pruner: with a ``config`` that tells ``in_dim`` and ``layer``.
        options: of its forward: seed, backend, precision, refine, on_invalid.
        runner: runs an OCPruner's slot loop beside the tower.
        max_error: for budgets to choose from.
        home: where it was needed last.
    """

    pruner: torch.nn.Module
    options: Mapping[str, Any]
    runner: SlotRunner = field(default_factory=SlotRunner)
    max_error: float | None = None
    reads_scores: bool = True
    home: Home = field(default_factory=Home, repr=False, compare=False)

    @property
    def name(self) -> str:
        """See :class:`Selector`."""
        return type(self.pruner).__name__

    @property
    def read_layer(self) -> int:
        """See :class:`Selector`."""
        config: Any = self.pruner.config
        return config.layer

    @property
    def runs_alone(self) -> bool:
        """Whether nobody else has a part in what the pruner does, so that the runner may run it."""
        return isinstance(self.pruner, OCPruner) and not is_minded(self.pruner) and _is_its_own(self.pruner)

    def begin(
        self,
        group: Group,
        features: torch.Tensor | None,
        device: torch.device,
        *,
        return_attention: bool = False,
    ) -> Begun:
        """See :class:`Selector`; on a GPU, beside the caller."""
        assert features is not None
        minded = is_minded(self.pruner)
        if not minded:
            self.home.move(self.pruner, features.device)
        options = dict(self.options)
        if return_attention:
            options["return_attention"] = True
        if not isinstance(group.keep, int):
            options |= {"keep": "auto", "budgets": group.keep, "max_error": self.max_error}
        elif isinstance(self.pruner, OCPruner) and not minded and _is_its_own(self.pruner):
            return self.runner.begin(self.pruner, features, group.keep, **options)
        else:
            options["keep"] = group.keep
        if minded:
            return Later(functools.partial(_inside_of_all, self.pruner, features.detach(), options))
        return Later(functools.partial(self.pruner, features.detach(), **options))

    def beside(self, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]) -> Started | None:
        """See :class:`Selector`; on the stream where slot loops run."""
        return None if self.pruner.training else self.runner.beside(work, reads)

    def close(self) -> None:
        """See :class:`Selector`."""
        self.runner.close()
        self.home.leave(self.pruner)


@dataclass(frozen=True)
class RuleSelector:
    """A rule without training, to compare with and to try the speed at once.

    The choice for an image depends on nothing but its own scores, features or size, whatever the batch.

    Attributes:
        name: ``"attention"``: the tokens that receive most in the layer the language model reads;
            ``"random"``: by ``seed`` alone; ``"grid"``: evenly spread; ``"farthest_point"`` and
            ``"greedy_dpp"``: features of ``read_layer`` unlike each other (:mod:`ocvtp.methods`).
        seed: for ``"random"``.
        read_layer: of rules that compare features, as a pruner's.
        rounds: of refinement, after such rules.
        backend: of rules that compare features, and of the refinement.
        on_invalid: what is done about images that are not finite.
    """

    name: Rule
    seed: int = 0
    read_layer: int | None = None
    rounds: int = 0
    backend: str = "auto"
    on_invalid: OnInvalid = "raise"

    @property
    def reads_scores(self) -> bool:
        """See :class:`Selector`."""
        return self.name == "attention"

    def begin(
        self,
        group: Group,
        features: torch.Tensor | None,
        device: torch.device,
        *,
        return_attention: bool = False,
    ) -> Begun:
        """See :class:`Selector`."""
        if return_attention:
            raise ValueError(f"{self.name!r} has no slots, so there is no slot attention to return")
        if reads_features(self.name):
            assert features is not None
            return Later(functools.partial(self._unlike, group, features.detach()))
        return Later(functools.partial(self._select, group, device))

    def _unlike(self, group: Group, features: torch.Tensor, fill_scores: torch.Tensor | None) -> Selection:
        """All segments at once in Triton; in PyTorch sums over a batch may round otherwise than alone."""
        keep = group.keep
        assert isinstance(keep, int)
        at_once = (
            features.dtype != torch.float64
            and resolve_backend(self.backend, "diversity", features.device) == "triton"
        )
        parts = features.split(len(features) if at_once else 1)
        found = [self._unlike_in(part, keep) for part in parts]
        indices, none = (torch.cat(some) for some in zip(*found, strict=True))
        return Selection(indices, none, tokens=group.tokens)

    def _unlike_in(self, features: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, keep]``, and ``[B]``: 0, or -1 for images that are not finite."""
        if self.name == "farthest_point":
            kept = k_medoids(
                features, keep, rounds=self.rounds, backend=self.backend, on_invalid=self.on_invalid
            )
            return kept.indices, kept.from_slots
        kept = greedy_dpp(features, keep, backend=self.backend, on_invalid=self.on_invalid)
        if not self.rounds:
            return kept.indices, kept.from_slots
        return refine(features, kept.indices, self.rounds, backend=self.backend), kept.from_slots

    def _select(self, group: Group, device: torch.device, fill_scores: torch.Tensor | None) -> Selection:
        keep = group.keep
        assert isinstance(keep, int)
        if self.name == "attention":
            assert fill_scores is not None
            return attention_top_k(fill_scores, keep, on_invalid=self.on_invalid)
        blank = torch.empty(1, group.tokens, 1, device=device)
        if self.name == "random":
            one = random_tokens(blank, keep, seed=self.seed)
        else:
            one = grid(blank, keep, shape=group.shape or (1, group.tokens))
        copies = len(group.which)
        return Selection(one.indices.expand(copies, -1), one.from_slots.expand(copies), tokens=one.tokens)

    def beside(self, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]) -> None:
        """See :class:`Selector`; nothing runs beside the tower."""

    def close(self) -> None:
        """See :class:`Selector`."""


def _is_its_own(pruner: torch.nn.Module) -> bool:
    """Whether calling the pruner does nothing else than :meth:`OCPruner.forward`."""
    hooks = (*pruner._forward_hooks, *pruner._forward_pre_hooks)
    return type(pruner).forward is OCPruner.forward and "forward" not in pruner.__dict__ and not hooks


def _inside_of_all(
    pruner: torch.nn.Module, features: torch.Tensor, options: Mapping[str, Any], fill_scores: torch.Tensor
) -> Selection:
    """Call a pruner whose weights come when it is called, also those that it reads from its parts."""
    made: list[Selection] = []

    def run(features: torch.Tensor) -> tuple[()]:
        made.append(pruner(features, fill_scores=fill_scores, **options))
        return ()

    inside(list(pruner.modules()), run, features)
    return made[0]


def _is_elsewhere(module: torch.nn.Module, device: torch.device) -> bool:
    return any(parameter.device != device for parameter in module.parameters())
