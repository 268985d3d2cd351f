"""Towers that see pictures of one size, and models that merge square units of patches into tokens.

What InternVL, Idefics3, SmolVLM, Gemma 3 and PaliGemma have in common: every picture (an image, or a tile or
crop of one, which the prompt alone relates) is chosen from by itself; its tokens are units of ``unit x unit``
patches in raster order; the language model consumes the end of the tower.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import Self

from ocvtp.vlm.contracts.adapter import Family, Vision
from ocvtp.vlm.contracts.errors import UnsupportedModelError
from ocvtp.vlm.contracts.fit import check_layers
from ocvtp.vlm.contracts.layout import first
from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.contracts.rows import KeptRows, Piece, Projected, Segment
from ocvtp.vlm.contracts.selector import Beside, Started
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.contracts.weights import inside
from ocvtp.vlm.layouts import layout_for
from ocvtp.vlm.layouts.squares import grouped, members
from ocvtp.vlm.towers.ahead import ahead
from ocvtp_kernels._device import on_device
from ocvtp_kernels.received_attention import received_attention


class MergedFamily(Family):
    """A family of pictures of one size. A subclass says how its tower and projector are called.

    Attributes:
        tower_name: of the vision tower in ``model.model``.
    """

    tower_name = "vision_tower"

    @property
    def stacked(self) -> bool:
        """Whether the model's encoder returns one tensor, so that all pictures keep equally many tokens."""
        return True

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "generate") or not hasattr(getattr(model, "model", None), self.tower_name):
            raise UnsupportedModelError(
                f"can't prune a {type(model).__name__}: pass the ...ForConditionalGeneration itself"
            )
        tower = getattr(model.model, self.tower_name)
        super().__init__(model, layout_for(model.config, tower.config))

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return getattr(self.model.model, self.tower_name)

    def around(self, arguments: Mapping[str, Any], settings: Settings) -> Sequence[Any]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        body = tower_root(self.tower)
        return [*super().around(arguments, settings), *([] if body is self.tower else [body]), body.encoder]

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that don't suit pictures of one size."""
        super().check(settings)
        stacked = self.stacked and settings.route == "mm_encoder_outputs"
        if stacked and settings.budget.keep == "auto":
            raise ValueError(
                f'keep="auto" gives images different numbers of tokens, which {self.model.config.model_type} '
                "can't take: it stacks them"
            )

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return [
            ("get_image_features", self.model, "get_image_features"),
            ("model.get_image_features", self.model.model, "get_image_features"),
            (f"model.{self.tower_name}.forward", self.tower, "forward"),
            (f"model.{self.tower_name}.encoder.forward", tower_root(self.tower).encoder, "forward"),
        ]

    def vision(self, modality: str, arguments: Mapping[str, Any], settings: Settings) -> Vision:
        """``arguments["pixel_values"]``, to be encoded.

        Raises:
            ValueError: arguments that don't describe pictures of this model.
        """
        pixels = self.pictures(arguments)
        patch, wanted = first(self.model.config.vision_config.patch_size), self.layout.side
        side = int(pixels.shape[-1]) // patch
        if pixels.ndim != 4 or side != wanted or pixels.shape[-2] != pixels.shape[-1]:
            raise ValueError(
                f"pixel_values {list(pixels.shape)} are not pictures of {wanted} x {wanted} patches; use the "
                "model's processor"
            )
        return Units(self, pixels, arguments, settings)

    @property
    def picture_side(self) -> int:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return int(first(self.model.config.vision_config.image_size))

    def picture_features(self, pictures: torch.Tensor, layer: int) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        hidden = self.embed(pictures)
        for one in itertools.islice(self.layers(), layer + 1):
            hidden = self.run_layer(one, hidden)
        return grouped(hidden[:, self.layout.prefix({}) :], self.layout.side, self.layout.unit).mean(2)

    def output(self, kept: KeptRows, modality: str) -> Any:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        made = super().output(kept, modality)
        if self.stacked:
            made.pooler_output = torch.stack(made.pooler_output)
        return made

    # What a subclass may say otherwise.

    def pictures(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """``[pictures, 3, H, W]`` from the arguments of a call."""
        pixels: torch.Tensor = arguments["pixel_values"]
        return pixels

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[pictures, 3, H, W] -> [pictures, tokens, C]``: what the first layer gets."""
        hidden: torch.Tensor = tower_root(self.tower).embeddings(pixels)
        return hidden

    def layers(self) -> Sequence[Any]:
        """The tower's layers."""
        layers: Sequence[Any] = tower_root(self.tower).encoder.layers
        return layers

    def run_layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """One of them."""
        out = layer(hidden, None)
        return out[0] if isinstance(out, tuple) else out  # some releases return (hidden, weights)

    def attention(self, layer: Any) -> Any:
        """A layer's attention."""
        return layer.self_attn

    def query_key(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys ``[pictures, tokens, C]`` of a layer's input, inside of the layer's call."""
        attention, x = layer.self_attn, layer.layer_norm1(hidden)
        return attention.q_proj(x), attention.k_proj(x)

    def norm(self, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """What the tower does after its last layer, token by token."""
        out: torch.Tensor = tower_root(self.tower).post_layernorm(hidden)
        return out

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """``[pictures, patches, C] -> [pictures, units, D]``, computed as upstream does."""
        raise NotImplementedError

    def project(self, units: torch.Tensor) -> torch.Tensor:
        """``[pictures, k, unit * unit, C] -> [pictures, k, D]``, if :attr:`projects_tokens`."""
        raise NotImplementedError


def tower_root(tower: Any) -> Any:
    """The module that holds embeddings and encoder (older releases nest it in ``vision_model``)."""
    return getattr(tower, "vision_model", tower)


class Units:
    """Pictures on their way through a tower (:class:`~ocvtp.vlm.contracts.adapter.Vision`)."""

    def __init__(
        self, family: MergedFamily, pixels: torch.Tensor, arguments: Mapping[str, Any], settings: Settings
    ) -> None:
        self._family = family
        self._pixels = pixels
        self._arguments = arguments
        self._consumed = family.layout.consumed(arguments)
        self._prefix = family.layout.prefix(arguments)
        self._members = on_device(members(family.layout.side, family.layout.unit), pixels.device)
        self._read: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._last_input: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None
        self._started: Started | None = None
        self._backend = settings.backend
        self.device = pixels.device
        count, tokens = len(pixels), len(self._members)
        self.segments: list[Segment] = family.layout.segments([1] * count)
        self.totals = [tokens] * count
        check_layers(settings.selector.read_layer, (self._consumed,))

    def run(
        self, read_layer: int | None, after: Callable[[], None] | None, beside: Beside | None = None
    ) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        family = self._family
        hidden = family.embed(self._pixels)
        for index, layer in enumerate(itertools.islice(family.layers(), self._consumed + 1)):
            self._last_input = hidden
            if index == self._consumed:
                scores = functools.partial(self._received, layer, hidden, self._backend)
                self._started = ahead(beside, layer, [hidden], scores, self._backend)
            hidden = family.run_layer(layer, hidden)
            if index == read_layer:
                self._read = self._grouped(hidden).mean(2)
                if after is not None:
                    after()
        self._last = hidden

    @property
    def pixels(self) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`."""
        return self._pixels

    @property
    def key(self) -> tuple[object, ...]:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`; the layer as it was asked for tells of a norm."""
        return (self._consumed, self._prefix, str(self._arguments.get("vision_feature_layer")))

    def on(self, pixels: torch.Tensor) -> Self:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`."""
        twin = copy.copy(self)
        twin._pixels = pixels
        return twin

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._read is not None
        return self._of(self._read, which)

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; a unit receives what its patches do."""
        if self._scores is None:
            if self._started is None:
                assert self._last_input is not None
                layer = self._family.layers()[self._consumed]
                scores = self._received(layer, self._last_input, backend)
            else:
                scores = self._started()
            self._scores = scores if self._read is None else scores.to(self._read.device)
        return self._of(self._scores, which)

    def _received(self, layer: Any, hidden: torch.Tensor, backend: str) -> torch.Tensor:
        """``[pictures, units]`` of a layer's input."""
        attention = self._family.attention(layer)
        with torch.no_grad():
            project = functools.partial(self._family.query_key, layer)
            query, key = inside((layer, attention), project, hidden)
            heads = self._family.tower.config.num_attention_heads
            query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
            received = received_attention(query, key, attention.scale, backend=backend)
            return self._grouped(received[:, :, None]).sum(2)[:, :, 0]

    def source(self, which: Sequence[int]) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; tokens are merged from several rows."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._last is not None
        patches = self._of(self._last, which)[:, self._prefix :]
        index = indices.to(patches.device)
        if self._family.projects_tokens and indices.shape[1] < len(self._members):
            members = self._members.to(patches.device, non_blocking=True)[index].flatten(1)
            kept = patches.gather(1, members[:, :, None].expand(-1, -1, patches.shape[2]))
            units = self._family.norm(kept, self._arguments).unflatten(1, (index.shape[1], -1))
            return [Piece(self._family.project(units), indices)]
        rows = self.projected(which).rows  # as upstream does, to the bit
        return [Piece(rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2])), indices)]

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return Projected(self._family.project_all(self._normed(which)))

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`: a unit's patches, side by side."""
        units = grouped(self._normed(which), self._family.layout.side, self._family.layout.unit)
        return (units.flatten(2),)

    def project(self, which: Sequence[int], sources: tuple[torch.Tensor, ...]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return Projected(self._family.project(sources[0].unflatten(2, (self._family.layout.unit**2, -1))))

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return [Piece(made.rows, indices, mass=mass)]

    def _normed(self, which: Sequence[int]) -> torch.Tensor:
        """``[pictures, patches, C]`` as the projector reads them."""
        assert self._last is not None
        return self._family.norm(self._of(self._last, which)[:, self._prefix :], self._arguments)

    def _grouped(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[pictures, tokens, C] -> [pictures, units, unit * unit, C]``."""
        return grouped(hidden[:, self._prefix :], self._family.layout.side, self._family.layout.unit)

    def _of(self, tensor: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        return some_of(tensor, which)
