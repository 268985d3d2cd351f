"""What a model family has to tell the patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ocvtp.vlm.contracts.layout import Layout, TowerFacts
from ocvtp.vlm.contracts.rows import KeptRows, Piece, Projected, Segment
from ocvtp.vlm.contracts.selector import Beside
from ocvtp.vlm.contracts.settings import Settings


class Vision(Protocol):
    """The images (or the videos) of one call on their way through the vision side.

    Made by an adapter from the arguments of a call, without running anything. ``which`` are numbers of
    segments of one size.
    """

    @property
    def segments(self) -> Sequence[Segment]:
        """What is chosen among."""

    @property
    def totals(self) -> Sequence[int]:
        """Placeholders per image or video in the unpruned prompt."""

    @property
    def device(self) -> torch.device:
        """Where the tower computes."""

    def run(
        self, read_layer: int | None, after: Callable[[], None] | None, beside: Beside | None = None
    ) -> None:
        """Run the tower.

        Args:
            read_layer: a layer whose output will be asked for.
            after: called as soon as that is there.
            beside: starts :meth:`scores` as soon as what they are made of is there. They need not use it.
        """

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """``[segments, N, C]``: candidates as ``read_layer`` made them."""

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """``[segments, N]``, at least float32: attention the candidates receive in the consumed layer."""

    def source(self, which: Sequence[int]) -> torch.Tensor | None:
        """``[segments, N, C]`` that :meth:`rows` wants the kept rows of, if there is such a tensor."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """Rows for the language model of the kept candidates.

        Args:
            which: segments.
            indices: ``[segments, k]``, ascending.
            taken: rows of :meth:`source` at ``indices``, if there was one.
        """

    def projected(self, which: Sequence[int]) -> Projected:
        """Rows for the language model of all candidates, ``n = N``, in their order."""

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """``[segments, N, C]`` that the projector reads of each candidate; then the same of DeepStack layers.

        Only if the adapter :attr:`~Adapter.projects_tokens`.
        """

    def project(self, which: Sequence[int], sources: tuple[torch.Tensor, ...]) -> Projected:
        """Rows for the language model of :meth:`sources`, or of means of them, ``[segments, n, C]``."""

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """Pieces of given rows, with what the model adds to them.

        Args:
            which: segments.
            indices: ``[segments, k]``, ascending: the candidates whose places the rows take.
            made: the rows, ``n = k``.
            mass: ``[segments, k]`` float32, how many candidates each stands for.
        """


class Adapter(Protocol):
    """One model family. Holds the model; everything else is passed in."""

    @property
    def pixel_keys(self) -> Mapping[str, str]:
        """Modality (``"image"``, ``"video"``) -> the argument that brings its pixels."""

    @property
    def vision_keys(self) -> tuple[str, ...]:
        """Arguments that say how to encode them; consumed by :meth:`vision` along with the pixels."""

    @property
    def mrope(self) -> bool:
        """Whether positions have three dimensions, which :meth:`positions` tells."""

    @property
    def first_position(self) -> int:
        """Position that ``forward`` gives the first token; ``generate`` counts from 0 in any case."""

    @property
    def needs_mm_route(self) -> bool:
        """Whether features can't be handed over as embeddings."""

    @property
    def masks_by_layer(self) -> bool:
        """Whether ``forward`` takes a mask per kind of layer."""

    @property
    def projects_tokens(self) -> bool:
        """Whether the projector reads candidates one by one, so that their means can be taken before it."""

    @property
    def layout(self) -> Any:
        """The family's :class:`~ocvtp.vlm.contracts.layout.Layout`."""

    @property
    def told_blocks(self) -> tuple[int, ...]:
        """Encoder layers whose attention a vision side tells rival methods of; none if it tells nothing."""

    @property
    def class_token(self) -> bool:
        """Whether the tower has one, where :attr:`told_blocks`."""

    @property
    def model(self) -> Any:
        """The patched ``...ForConditionalGeneration``."""

    def token_id(self, modality: str) -> int:
        """The placeholder."""

    def facts(self, arguments: Mapping[str, Any]) -> TowerFacts:
        """The vision side under the model's configuration and per-call ``arguments``."""

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that this family can't serve."""

    def check_call(self, arguments: Mapping[str, Any], *, generating: bool) -> None:
        """Raise ``ValueError`` for a call with pixels that this family can't serve."""

    def check_packed(self, arguments: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for several documents in one row that this family can't tell apart."""

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """``(path, module, method)`` of upstream methods that the patch goes around."""

    def vision(self, modality: str, arguments: Mapping[str, Any], settings: Settings) -> Vision:
        """The pixels of a modality in ``arguments``, to be encoded.

        Raises:
            ValueError: arguments that don't describe images of this model.
        """

    @property
    def tower(self) -> Any:
        """The vision tower."""

    def around(self, arguments: Mapping[str, Any], settings: Settings) -> Sequence[Any]:
        """Modules of which :meth:`vision` calls parts without calling them, outermost first.

        Weights that are brought when a module is called are to be brought to all of these (:func:`.inside`).

        Args:
            arguments: of the call.
            settings: of the call.
        """

    @property
    def picture_side(self) -> int | None:
        """Pixels along the side of a picture; ``None`` where any size will do."""

    def picture_features(self, pictures: torch.Tensor, layer: int) -> torch.Tensor:
        """``[b, 3, side, side] -> [b, N, C]``: what a pruner reads of square pictures, to train one."""

    @property
    def vision_parts(self) -> Sequence[Any]:
        """All modules that a vision side runs."""

    @property
    def unsteady(self) -> str | None:
        """Why its vision side can't be recorded and replayed; ``None`` where it is a
        :class:`~ocvtp.vlm.contracts.steady.Steady`."""

    def output(self, kept: KeptRows, modality: str) -> Any:
        """The kept rows as the model's own encoder would return them."""

    def positions(
        self, ids: torch.Tensor, mask: torch.Tensor | None, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        """``[3, B, S]`` positions of a prompt that starts at 0, where :attr:`mrope`."""

    def remember(self, next_position: torch.Tensor, mask: torch.Tensor) -> None:
        """Leave on the model what it keeps of a prompt's positions, where :attr:`mrope`.

        Args:
            next_position: ``[B, 1]``.
            mask: ``[B, short]``.
        """

    def recall(self, batch: int) -> torch.Tensor | int:
        """What the model keeps: ``[batch, 1]`` next position less the number of tokens, where :attr:`mrope`.

        Raises:
            ValueError: it keeps that of another batch.
        """


class Family:
    """What most families have in common. An :class:`Adapter` overrides what is different."""

    pixel_keys: Mapping[str, str] = {"image": "pixel_values"}
    vision_keys: tuple[str, ...] = ()
    mrope = False
    first_position = 0
    needs_mm_route = False
    masks_by_layer = True
    projects_tokens = True
    told_blocks: tuple[int, ...] = ()
    class_token = False
    unsteady: str | None = None

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model = model
        self.layout: Any = layout

    def token_id(self, modality: str) -> int:
        """See :class:`Adapter`."""
        found: int = getattr(self.model.config, f"{modality}_token_id")
        return found

    def check(self, settings: Settings) -> None:
        """See :class:`Adapter`."""
        self.layout.check(settings)

    def facts(self, arguments: Mapping[str, Any]) -> TowerFacts:
        """See :class:`Adapter`."""
        attention = str(self.tower.config._attn_implementation)
        facts: TowerFacts = self.layout.facts(arguments, attention=attention, device=device_of(self.tower))
        return facts

    def check_call(self, arguments: Mapping[str, Any], *, generating: bool) -> None:
        """See :class:`Adapter`."""

    def check_packed(self, arguments: Mapping[str, Any]) -> None:
        """See :class:`Adapter`."""

    @property
    def tower(self) -> Any:
        """The vision tower."""
        raise NotImplementedError

    def around(self, arguments: Mapping[str, Any], settings: Settings) -> Sequence[Any]:
        """See :class:`Adapter`."""
        return [self.model, self.model.model, self.tower]

    @property
    def vision_parts(self) -> Sequence[Any]:
        """See :class:`Adapter`: all of the inner model but its language model."""
        inner, language = self.model.model, self.model.get_decoder()
        return [part for part in inner.children() if part is not language]

    def output(self, kept: KeptRows, modality: str) -> Any:
        """See :class:`Adapter`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=list(kept.rows))

    def positions(
        self, ids: torch.Tensor, mask: torch.Tensor | None, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        """See :class:`Adapter`."""
        raise NotImplementedError("positions of this family have one dimension")

    def remember(self, next_position: torch.Tensor, mask: torch.Tensor) -> None:
        """See :class:`Adapter`."""

    def recall(self, batch: int) -> torch.Tensor | int:
        """See :class:`Adapter`."""
        return 0


def device_of(tower: torch.nn.Module) -> torch.device:
    """Where a tower computes, as far as it can be told: weights that are offloaded lie nowhere."""
    device = next(tower.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
