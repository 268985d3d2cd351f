"""LLaVA-1.5 and its relatives: ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import Self

from ocvtp.vlm.contracts.adapter import Family, Vision
from ocvtp.vlm.contracts.errors import UnsupportedModelError
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.fit import check_layers
from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.contracts.rows import Piece, Projected, Segment
from ocvtp.vlm.contracts.selector import Beside, Started
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.families.witness import Witness
from ocvtp.vlm.layouts import layout_for
from ocvtp.vlm.towers.ahead import ahead
from ocvtp.vlm.towers.clip import LayerInput, TowerRun, root, run_tower
from ocvtp_kernels.selection import gather_tokens


class LlavaAdapter(Family):
    """Tower -> pruner -> projector on the kept rows (``LlavaModel.get_image_features``, pruned)."""

    vision_keys: tuple[str, ...] = ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any) -> None:
        inner: Any = getattr(model, "model", None)
        if not hasattr(model, "generate") or not hasattr(inner, "vision_tower"):
            raise UnsupportedModelError(
                f"can't prune a {type(model).__name__}: pass the ...ForConditionalGeneration itself"
            )
        super().__init__(model, layout_for(model.config, inner.vision_tower.config))
        self.told_blocks = tuple(range(max(self.layout.consumed({})) + 1))
        self.class_token = self.layout.class_token

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """Upstream methods on the way from pixels to rows, which the patch replaces."""
        inner = self.model.model
        tower = inner.vision_tower
        found = [
            ("get_image_features", self.model, "get_image_features"),
            ("model.get_image_features", inner, "get_image_features"),
            ("model.vision_tower.forward", tower, "forward"),
            ("model.vision_tower.encoder.forward", root(tower).encoder, "forward"),
        ]
        if root(tower) is not tower:
            found.append(("model.vision_tower.vision_model.forward", root(tower), "forward"))
        return found

    def vision(self, modality: str, arguments: Mapping[str, Any], settings: Settings) -> Vision:
        """``arguments["pixel_values"]`` ``[images, 3, H, W]``, to be encoded.

        Raises:
            ValueError: arguments that don't describe images of this tower, or a per-call feature layer that
                the pruner's layer is not below.
        """
        if arguments.get("image_sizes") is not None:
            raise ValueError("image_sizes belongs to Pixtral towers; this model's images have one size")
        return _Images(self, arguments["pixel_values"], arguments, settings)

    @property
    def tower(self) -> Any:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return self.model.model.vision_tower

    def around(self, arguments: Mapping[str, Any], settings: Settings) -> Sequence[Any]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`; a layer that is held is not called either."""
        body = root(self.tower)
        found = [*super().around(arguments, settings), *([] if body is self.tower else [body]), body.encoder]
        if settings.tower == "kept_rows":
            layer = body.encoder.layers[max(self.layout.consumed(arguments))]
            found += [layer, layer.self_attn]
        return found

    @property
    def picture_side(self) -> int:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return int(self.model.config.vision_config.image_size)

    def picture_features(self, pictures: torch.Tensor, layer: int) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        prefix, _ = self.layout.prefix({})
        return run_tower(self.tower, pictures, {layer}).outputs[layer][:, prefix:]


class Pictures:
    """Pictures of one size on their way through a CLIP or SigLIP tower.

    Args:
        adapter: of the model.
        pixel_values: ``[pictures, 3, H, W]``.
        arguments: of the call.
        settings: of the call.

    Attributes:
        prefix: tokens before the first candidate.
        class_rows: how many of them are handed over nevertheless.
        patches: candidates of a picture.
        shape: rows and columns of the candidates, if all patches are.
        hold: whether the end of the deepest consumed layer is computed for kept rows only.
        blocks: earlier layers whose attention will be asked for.
        backend: of fused operations.
        class_token: whether the tower has one.
    """

    def __init__(
        self,
        adapter: LlavaAdapter,
        pixel_values: torch.Tensor,
        arguments: Mapping[str, Any],
        settings: Settings,
    ) -> None:
        self._tower = adapter.model.model.vision_tower
        self._projector = adapter.model.model.multi_modal_projector
        self._pixels = pixel_values
        self._consumed = adapter.layout.consumed(arguments)
        self.hold = settings.tower == "kept_rows"
        self.blocks = settings.blocks
        self.backend = settings.backend
        self._read: torch.Tensor | None = None
        self._received: torch.Tensor | None = None
        self._started: Started | None = None
        self._run: TowerRun | None = None
        self._projected: torch.Tensor | None = None
        self.device = pixel_values.device
        self.prefix, self.class_rows = adapter.layout.prefix(arguments)
        self.patches: int = adapter.layout.patches(arguments)
        self.shape: tuple[int, int] | None = adapter.layout.shape(arguments)
        self.class_token: bool = adapter.layout.class_token
        check_layers(settings.selector.read_layer, self._consumed)

    def run(
        self, read_layer: int | None, after: Callable[[], None] | None, beside: Beside | None = None
    ) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; a layer that is held has its queries and keys."""

        def tapped(layer: int, output: torch.Tensor) -> None:
            if layer == read_layer:
                self._read = output[:, self.prefix :]
                if after is not None:
                    after()

        taps = {*self._consumed} if read_layer is None else {*self._consumed, read_layer}

        def deepest(one: LayerInput) -> None:
            def scores() -> torch.Tensor:
                return one.received_attention(self.backend)[:, self.prefix :]

            self._started = ahead(beside, one.layer, [one.hidden], scores, self.backend)

        self._run = run_tower(
            self._tower, self._pixels, taps, tapped, hold=self.hold, scored=self.blocks, ahead=deepest
        )

    @property
    def pixels(self) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`."""
        return self._pixels

    @property
    def key(self) -> tuple[object, ...]:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`."""
        return (self._consumed, self.prefix, self.class_rows, self.patches)

    def on(self, pixels: torch.Tensor) -> Self:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`."""
        twin = copy.copy(self)
        twin._pixels = pixels
        return twin

    @property
    def read(self) -> torch.Tensor:
        """``[pictures, N, C]``: candidates as the pruner's layer made them."""
        assert self._read is not None
        return self._read

    @property
    def done(self) -> TowerRun:
        """The tower's run."""
        assert self._run is not None
        return self._run

    def received(self, backend: str) -> torch.Tensor:
        """``[pictures, N]``: attention that candidates receive in the deepest consumed layer."""
        if self._received is None:
            if self._started is None:
                scores = self.done.received_attention(backend)[:, self.prefix :]
            else:
                scores = self._started()
            self._received = scores if self._read is None else scores.to(self._read.device)
        return self._received

    def outputs(self) -> torch.Tensor | None:
        """``[pictures, N, C]``: candidates as the projector reads them, if it reads one whole layer."""
        return None if self.hold or len(self._consumed) > 1 else self.all_outputs()

    def all_outputs(self) -> torch.Tensor:
        """``[pictures, tokens, C of all consumed layers]``: all that the projector reads, class rows too."""
        first = self.prefix - self.class_rows
        layers = [self.done.outputs[layer][:, first:] for layer in self._consumed]
        return layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1)

    def all_projected(self) -> torch.Tensor:
        """``[pictures, tokens, D]``: :meth:`all_outputs` through the projector, which runs once a call."""
        if self._projected is None:
            self._projected = self.run_projector(self.all_outputs())
        return self._projected

    def taken(self, which: Sequence[int], indices: torch.Tensor) -> torch.Tensor:
        """``[pictures, k, C of all consumed layers]``: rows of ``which`` at ``indices`` of all tokens."""
        deepest = max(self._consumed)
        rows = [
            self.done.finish(indices, which)
            if layer == deepest
            else gather_tokens(some_of(output := self.done.outputs[layer], which), indices.to(output.device))
            for layer in self._consumed
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def taken_flat(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, C of all consumed layers]``: rows at ``tokens`` ``[n]``, counted through all pictures."""
        deepest = max(self._consumed)
        rows = [
            self.done.finish_flat(tokens)
            if layer == deepest
            else (output := self.done.outputs[layer]).flatten(0, 1)[tokens.to(output.device)]
            for layer in self._consumed
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def run_projector(self, features: torch.Tensor) -> torch.Tensor:
        """``[..., C of all consumed layers] -> [..., D]``."""
        rows: torch.Tensor = self._projector(features)
        return rows

    def project(self, which: Sequence[int], sources: tuple[torch.Tensor, ...]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return Projected(self.run_projector(sources[0]))

    def witness(
        self, pictures: Sequence[int], tiles: int = 1, grids: Sequence[tuple[int, int]] = ()
    ) -> Witness:
        """What the tower tells of some pictures, ``tiles`` of which are one image, laid out in ``grids``.

        Raises:
            ValueError: the projector reads several layers, or the class token too.
        """
        if len(self._consumed) > 1 or self.class_rows:
            raise ValueError(
                "rival methods are defined for one vision_feature_layer and "
                'vision_feature_select_strategy="default"'
            )
        return Witness(
            tower=self._tower,
            done=lambda: self.done,
            pixels=self._pixels,
            projects=self.all_projected,
            pictures=tuple(pictures),
            tiles=tiles,
            grids=grids,
            tokens=self.patches,
            shape=self.shape,
            class_token=self.class_token,
            prefix=self.prefix,
            consumed=self._consumed[0],
            backend=self.backend,
        )


class _Images(Pictures):
    """Every picture is an image of its own (:class:`~ocvtp.vlm.contracts.adapter.Vision`)."""

    def __init__(
        self,
        adapter: LlavaAdapter,
        pixel_values: torch.Tensor,
        arguments: Mapping[str, Any],
        settings: Settings,
    ) -> None:
        super().__init__(adapter, pixel_values, arguments, settings)
        count = pixel_values.shape[0]
        self.segments: list[Segment] = adapter.layout.segments(count, arguments)
        self.totals = [self.patches + self.class_rows] * count

    def evidence(self, which: Sequence[int]) -> Evidence:
        """See :class:`~ocvtp.vlm.contracts.evidence.Telling`."""
        return self.witness(which)

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return some_of(self.read, which)

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return some_of(self.received(backend), which)

    def source(self, which: Sequence[int]) -> torch.Tensor | None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        outputs = None if self.class_rows else self.outputs()
        return None if outputs is None else some_of(outputs, which)

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        slots = self._slots(indices)
        if indices.shape[1] == self.patches and not self.hold:  # as upstream does, to the bit
            return [Piece(some_of(self.all_projected(), which), slots)]
        if taken is None:
            taken = self.taken(which, slots + (self.prefix - self.class_rows))
        return [Piece(self.run_projector(taken), slots)]

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return Projected(some_of(self.all_projected(), which)[:, self.class_rows :])

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return (some_of(self.all_outputs(), which)[:, self.class_rows :],)

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        rows = made.rows
        if self.class_rows:
            rows = torch.cat([self._class(which), rows], dim=1)
            mass = None if mass is None else torch.nn.functional.pad(mass, (self.class_rows, 0), value=1.0)
        return [Piece(rows, self._slots(indices), mass=mass)]

    def _slots(self, indices: torch.Tensor) -> torch.Tensor:
        if not self.class_rows:
            return indices
        return torch.cat([indices.new_zeros(indices.shape[0], 1), indices + 1], dim=1)

    def _class(self, which: Sequence[int]) -> torch.Tensor:
        """``[pictures, class rows, D]``."""
        if self._projected is not None:
            return some_of(self._projected, which)[:, : self.class_rows]
        return self.run_projector(some_of(self.all_outputs(), which)[:, : self.class_rows])
