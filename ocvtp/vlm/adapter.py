"""What a model family has to tell the patch, and the list of families."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ocvtp.selection import Selection
from ocvtp.vlm.errors import UnsupportedModelError
from ocvtp.vlm.timing import Clock

_moving = threading.Lock()

Positions = Literal["compact", "original"]
Route = Literal["mm_encoder_outputs", "inputs_embeds"]


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

    @property
    def read_layer(self) -> int:
        """0-based index of the encoder layer whose output the pruner reads."""
        config: Any = self.pruner.config
        return config.layer

    def select(
        self, features: torch.Tensor, fill_scores: torch.Tensor, *, return_attention: bool = False
    ) -> Selection:
        """The pruner's choice for ``features`` ``[B, N, in_dim]``, on the features' device."""
        move_to(self.pruner, features.device)
        extra = {"return_attention": True} if return_attention else {}
        with torch.no_grad():
            return self.pruner(
                features.detach(),
                keep=self.keep,
                fill_scores=fill_scores,
                seed=self.seed,
                backend=self.backend,
                precision=self.precision,
                **extra,
            )


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
