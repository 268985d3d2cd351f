"""What a model family has to tell the patch, and the list of families."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ocvtp.capture import SlotRunner
from ocvtp.pruner import OCPruner
from ocvtp.selection import Selection
from ocvtp.vlm.errors import UnsupportedModelError
from ocvtp.vlm.timing import Clock
from ocvtp_kernels.selection import gather_tokens

_moving = threading.Lock()

Positions = Literal["compact", "original"]
Route = Literal["mm_encoder_outputs", "inputs_embeds"]


class Choice(Protocol):
    """Somebody who can select, once there are fill scores."""

    def select(self, fill_scores: torch.Tensor | None) -> Selection:
        """The kept tokens."""

    def select_rows(
        self, fill_scores: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[Selection, torch.Tensor]:
        """The kept tokens, and their rows of ``x`` ``[B, N, C]``."""


class Begun(Protocol):
    """A choice under way."""

    def get(self) -> Choice:
        """The choice, for use on the current stream."""


@dataclass(frozen=True)
class Later:
    """A pruner that can't start before there are fill scores: one that is not an OCPruner as we know it."""

    run: Callable[..., Selection]

    def get(self) -> Later:
        """See :class:`Begun`."""
        return self

    @torch.no_grad()
    def select(self, fill_scores: torch.Tensor | None) -> Selection:
        """See :class:`Choice`."""
        return self.run(fill_scores=fill_scores)

    def select_rows(
        self, fill_scores: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[Selection, torch.Tensor]:
        """See :class:`Choice`."""
        selection = self.select(fill_scores)
        return selection, gather_tokens(x, selection.indices.to(x.device))


@dataclass(frozen=True)
class Settings:
    """What a user chose in :func:`ocvtp.apply`. Immutable: a call works on the one it started with."""

    pruner: torch.nn.Module
    keep: int
    positions: Positions
    seed: int
    backend: str
    precision: str
    route: Route
    attention: str
    runner: SlotRunner
    refine: int = 0

    @property
    def read_layer(self) -> int:
        """0-based index of the encoder layer whose output the pruner reads."""
        config: Any = self.pruner.config
        return config.layer

    def begin(self, features: torch.Tensor, *, return_attention: bool = False) -> Begun:
        """Start choosing among ``features`` ``[B, N, in_dim]``; on a GPU, beside the caller."""
        move_to(self.pruner, features.device)
        options: dict[str, Any] = {"seed": self.seed, "backend": self.backend, "precision": self.precision}
        if return_attention:
            options["return_attention"] = True
        if self.refine:
            options["refine"] = self.refine
        if isinstance(self.pruner, OCPruner) and _is_its_own(self.pruner):
            return self.runner.begin(self.pruner, features, self.keep, **options)
        return Later(functools.partial(self.pruner, features.detach(), keep=self.keep, **options))


def _is_its_own(pruner: torch.nn.Module) -> bool:
    """Whether calling the pruner does nothing else than :meth:`OCPruner.forward`."""
    hooks = (*pruner._forward_hooks, *pruner._forward_pre_hooks)
    return type(pruner).forward is OCPruner.forward and "forward" not in pruner.__dict__ and not hooks


def move_to(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module unless it is there: the vision tower may have moved since the last call."""
    if _is_elsewhere(module, device):
        with _moving:  # another thread may be half-way
            if _is_elsewhere(module, device):
                module.to(device)


def _is_elsewhere(module: torch.nn.Module, device: torch.device) -> bool:
    return any(parameter.device != device for parameter in module.parameters())


@dataclass(frozen=True)
class ImageRows:
    """Rows of a batch of images for the language model.

    Attributes:
        rows: ``[images, kept, D]`` projected features in prompt order.
        slots: ``[images, kept]`` int64, which of its image's placeholders each row belongs to, ascending.
        total: placeholders per image in the unpruned prompt.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    total: int

    @property
    def complete(self) -> bool:
        """Whether nothing was dropped."""
        return self.slots.shape[1] == self.total


@dataclass(frozen=True)
class TowerFacts:
    """Static facts about a model's vision side, for checks and the report."""

    tower: str
    width: int
    num_layers: int
    consumed_layers: tuple[int, ...]
    tokens: int
    extra_rows: int
    attention: str
    device: torch.device


class Adapter(Protocol):
    """One model family. Holds the model; everything else is passed in."""

    @property
    def pixel_keys(self) -> tuple[str, ...]:
        """Arguments that bring pixels: one present means there is something to prune."""

    @property
    def vision_keys(self) -> tuple[str, ...]:
        """Arguments that say how to encode them; consumed by :meth:`encode` along with the pixels."""

    def __init__(self, model: torch.nn.Module) -> None: ...

    @property
    def model(self) -> Any:
        """The patched ``...ForConditionalGeneration``."""

    @property
    def image_token_id(self) -> int:
        """The placeholder."""

    def facts(self, arguments: Mapping[str, Any]) -> TowerFacts:
        """The vision side under the model's configuration and per-call ``arguments``."""

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """``(path, module, method)`` of upstream methods that the patch goes around."""

    def encode(self, arguments: Mapping[str, Any], settings: Settings, clock: Clock | None) -> ImageRows:
        """Run tower, pruner and projector on the pixels in ``arguments``."""

    def select(self, pixel_values: torch.Tensor, settings: Settings, *, return_attention: bool) -> Selection:
        """Run tower and pruner only."""


def _llava(model: torch.nn.Module) -> Adapter:
    from ocvtp.vlm.llava import LlavaAdapter

    return LlavaAdapter(model)


#: Families by ``config.model_type``.
ADAPTERS: dict[str, Callable[[torch.nn.Module], Adapter]] = {"llava": _llava}


def adapter_for(model: Any) -> Adapter:
    """The adapter of ``model``.

    Raises:
        UnsupportedModelError: none knows it; the message lists those there are.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in ADAPTERS:
        raise UnsupportedModelError(
            f"can't prune {type(model).__name__} (model_type {family!r}); "
            f"supported: {', '.join(sorted(ADAPTERS))}"
        )
    return ADAPTERS[family](model)
