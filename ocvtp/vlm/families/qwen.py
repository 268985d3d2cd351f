"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, tokens of 2 x 2 merged patches."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.contracts.adapter import Family, Vision
from ocvtp.vlm.contracts.errors import UnsupportedModelError
from ocvtp.vlm.contracts.evidence import Evidence, Merged, OneHead
from ocvtp.vlm.contracts.fit import check_layers
from ocvtp.vlm.contracts.rows import KeptRows, Piece, Projected, Segment
from ocvtp.vlm.contracts.selector import Beside, Started
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.contracts.versions import transformers_older_than
from ocvtp.vlm.layouts import layout_for
from ocvtp.vlm.layouts.qwen_geometry import as_grids, patchify
from ocvtp.vlm.layouts.units import full_blocks
from ocvtp.vlm.towers.ahead import ahead
from ocvtp.vlm.towers.qwen import QwenTowerRun, run_qwen_tower
from ocvtp_kernels._device import on_device


class _Enough(Exception):
    """The features are there: the blocks that follow need not run."""


class QwenAdapter(Family):
    """Tower -> choice per image or frame -> merger on the kept units.

    Candidates are the merged units in raster order, whatever order the tower computes in. Kept tokens keep
    their three-dimensional positions: the span of an image is its longer side, so nothing is wasted, and
    nothing else can be right.
    """

    pixel_keys: Mapping[str, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
    vision_keys = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    mrope = True
    unsteady = "images of Qwen-VL differ in size, and the host tells its tower where their patches are"

    def __init__(self, model: Any) -> None:
        inner: Any = getattr(model, "model", None)
        if not hasattr(model, "generate") or not hasattr(inner, "visual"):
            raise UnsupportedModelError(
                f"can't prune a {type(model).__name__}: pass the ...ForConditionalGeneration itself"
            )
        super().__init__(model, layout_for(model.config, inner.visual.config))
        full = full_blocks(inner.visual)
        self.told_blocks = tuple(range(len(inner.visual.blocks)) if full is None else sorted(full))
        # Embeddings have no place for the features that DeepStack adds inside the language model.
        self.needs_mm_route = bool(getattr(inner.visual, "deepstack_visual_indexes", ()))

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that this family or this tower can't serve."""
        super().check(settings)
        if transformers_older_than("5.10"):
            raise ValueError(
                f"pruning {self.model.config.model_type} needs transformers >= 5.10: generate of older ones "
                "can't take positions in three dimensions"
            )

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        inner = self.model.model
        return [
            *(("get_" + kind, self.model, "get_" + kind) for kind in ("image_features", "video_features")),
            *(("model.get_" + kind, inner, "get_" + kind) for kind in ("image_features", "video_features")),
            ("model.visual.forward", inner.visual, "forward"),
            ("model.visual.merger.forward", inner.visual.merger, "forward"),
        ]

    def vision(self, modality: str, arguments: Mapping[str, Any], settings: Settings) -> Vision:
        """Patches ``[patches, values]`` of images or videos, and their grids.

        Raises:
            ValueError: no grids, or pixels that don't fit them.
        """
        key = f"{modality}_grid_thw"
        grids = arguments.get(key)
        if grids is None:
            raise ValueError(f"{key} is missing: pass everything that the processor made")
        return _Units(self, arguments[self.pixel_keys[modality]], grids, settings)

    @property
    def tower(self) -> Any:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        return self.model.model.visual

    @property
    def picture_side(self) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""

    def picture_features(self, pictures: torch.Tensor, layer: int) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`.

        Raises:
            ValueError: pictures of which no whole units can be made.
        """
        found: list[torch.Tensor] = []

        def enough(_: int, features: torch.Tensor) -> None:
            found.append(features)
            raise _Enough

        config = self.tower.config
        merge, side = int(config.spatial_merge_size), int(config.patch_size)
        patches = patchify(pictures, side, merge, int(config.temporal_patch_size))
        rows, columns = pictures.shape[2] // side, pictures.shape[3] // side
        with contextlib.suppress(_Enough):
            run_qwen_tower(self.tower, patches, [[1, rows, columns]] * len(pictures), {layer}, enough)
        return found[0].unflatten(0, (len(pictures), -1))

    def output(self, kept: KeptRows, modality: str) -> Any:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        if not kept.deep:
            return super().output(kept, modality)
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(kept.rows), deepstack_features=[list(layer) for layer in kept.deep]
        )

    def positions(
        self, ids: torch.Tensor, mask: torch.Tensor | None, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        """Temporal, row and column positions ``[3, B, S]`` of the long prompt, from the model's own rules."""
        function = self.model.model.get_rope_index
        images, videos = (ids == self.token_id(kind) for kind in ("image", "video"))
        passed = {name: arguments[name] for name in self.vision_keys if arguments.get(name) is not None}
        types = images.int() + 2 * videos.int()
        if mask is not None:  # upstream can't number a row that is padding alone; any numbers do there
            dead = (mask == 0).all(1, keepdim=True)
            types, mask = types.masked_fill(dead, 0), mask.masked_fill(dead, 1)
        passed["mm_token_type_ids"] = types
        passed["attention_mask"] = mask
        known = inspect.signature(function).parameters  # releases differ
        positions, _ = function(ids, **{name: value for name, value in passed.items() if name in known})
        numbers: torch.Tensor = positions
        return numbers

    def remember(self, next_position: torch.Tensor, mask: torch.Tensor) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        self.model.model.rope_deltas = next_position - mask.sum(1, keepdim=True)

    def recall(self, batch: int) -> torch.Tensor | int:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        deltas: torch.Tensor | None = self.model.model.rope_deltas
        if deltas is None:
            return 0
        if batch % len(deltas):
            raise ValueError(
                f"the cache holds {batch} sequence(s) and was filled before ocvtp was applied, and the model "
                f"has since answered a call of {len(deltas)}: where the tokens in the cache were is "
                "forgotten. Start the conversation anew, or let no other call come in between"
            )
        return deltas.repeat_interleave(batch // len(deltas), 0)  # upstream's own rule for beams


class _Units:
    """Images or videos of merged units (:class:`~ocvtp.vlm.contracts.adapter.Vision`)."""

    def __init__(self, adapter: QwenAdapter, pixels: torch.Tensor, grids: Any, settings: Settings) -> None:
        facts = adapter.facts({})
        check_layers(settings.selector.read_layer, facts.consumed_layers)
        self._tower = adapter.model.model.visual
        # Upstream's own conversion, where its weights say what to.
        self._pixels = pixels.type(self._tower.dtype)
        self._grids = as_grids(grids, facts.unit)
        self._blocks = settings.blocks
        self._backend = settings.backend
        self._run: QwenTowerRun | None = None
        self._scores: torch.Tensor | None = None
        self._started: Started | None = None
        self._features: torch.Tensor | None = None
        self._all: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self.device = pixels.device
        cut = adapter.layout.cut(self._grids, settings.frames)
        self.segments: list[Segment] = cut.segments
        self.totals: list[int] = cut.totals
        self._offsets: list[int] = cut.offsets
        self._starts = list(itertools.accumulate((s.tokens for s in self.segments), initial=0))

    def run(
        self, read_layer: int | None, after: Callable[[], None] | None, beside: Beside | None = None
    ) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""

        def tapped(layer: int, features: torch.Tensor) -> None:
            self._features = features
            if after is not None:
                after()

        def scored(run: QwenTowerRun, block: Any, reads: Sequence[torch.Tensor]) -> None:
            scores = functools.partial(run.received_attention, self._backend)
            self._started = ahead(beside, block, reads, scores, self._backend)

        taps = () if read_layer is None else (read_layer,)
        self._run = run_qwen_tower(self._tower, self._pixels, self._grids, taps, tapped, self._blocks, scored)

    def evidence(self, which: Sequence[int]) -> Evidence:
        """See :class:`~ocvtp.vlm.contracts.evidence.Telling`."""
        assert self._run is not None
        return _Witness(self, self._run, tuple(which), self._backend)

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._features is not None
        return self.of(self._features, which)

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; every frame's attention sums to 1."""
        assert self._run is not None
        if self._scores is None:
            scores = self._run.received_attention(backend) if self._started is None else self._started()
            self._scores = scores if self._features is None else scores.to(self._features.device)
        return self.of(self._scores, which)

    def source(self, which: Sequence[int]) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; the merger takes kept units' patches itself."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._run is not None
        if indices.shape[1] == self.segments[which[0]].tokens:  # as upstream does, to the bit
            return self.place(which, indices, self.projected(which), None)
        starts = on_device(torch.tensor([self._starts[i] for i in which]), indices.device)
        units = (indices + starts[:, None]).flatten()
        rows = self._run.merged(units).unflatten(0, (len(which), -1))
        deep = tuple(deep.unflatten(0, (len(which), -1)) for deep in self._run.deepstack(units))
        return self.place(which, indices, Projected(rows, deep), None)

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._run is not None
        if self._all is None:  # the merger sees all units, once a call
            self._all = self._run.merged(), self._run.deepstack()
        rows, deeper = self._all
        return Projected(self.of(rows, which), tuple(self.of(deep, which) for deep in deeper))

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`: a unit's patches, side by side."""
        assert self._run is not None
        return tuple(self.of(units, which) for units in self._run.units())

    def project(self, which: Sequence[int], sources: tuple[torch.Tensor, ...]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._run is not None
        rows, *deep = (
            made.unflatten(0, (len(which), -1))
            for made in self._run.merge_units([units.flatten(0, 1) for units in sources])
        )
        return Projected(rows, tuple(deep))

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        offsets = on_device(torch.tensor([self._offsets[i] for i in which]), indices.device)
        return [Piece(made.rows, indices + offsets[:, None], made.deep, mass)]

    def of(self, units: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """``[units, ...] -> [segments, N, ...]``; without a copy where they follow one another."""
        first, last = self._starts[which[0]], self._starts[which[-1] + 1]
        tokens = self.segments[which[0]].tokens
        if last - first == len(which) * tokens:
            return units[first:last].unflatten(0, (len(which), tokens))
        return torch.stack([units[self._starts[i] : self._starts[i + 1]] for i in which])


@dataclass(frozen=True, eq=False)  # tensors have no truth
class _Witness:
    """Some segments of a call (:class:`~ocvtp.vlm.contracts.evidence.Evidence`). There is no class token."""

    units: _Units
    done: QwenTowerRun
    which: tuple[int, ...]
    backend: str
    tiles = 1
    grids = ()
    class_token = False

    @property
    def consumed(self) -> int:
        """See the protocol."""
        return len(self.done.tower.blocks) - 1

    @property
    def tokens(self) -> int:
        """See the protocol."""
        return self.units.segments[self.which[0]].tokens

    @property
    def shape(self) -> tuple[int, int] | None:
        """See the protocol."""
        return self.units.segments[self.which[0]].shape

    def features(self) -> torch.Tensor:
        """See the protocol: a unit's mean over its patches."""
        patches = self.done.units()[0].unflatten(1, (self.done.merge**2, -1))
        return self.units.of(patches.mean(1), self.which)

    def salience(self) -> torch.Tensor:
        """See the protocol."""
        return self.units.of(self.done.received_attention(self.backend), self.which)

    def received(self, block: int) -> torch.Tensor:
        """See the protocol; a unit receives what its patches do."""
        return self.units.of(self.done.received_attention(self.backend, block), self.which)

    def keys(self) -> torch.Tensor:
        """See the protocol: after rotation, mean over a unit's patches too."""
        return self.units.of(self.done.mean_keys(), self.which)

    def one_head(self) -> OneHead:
        """See the protocol. The last block has heads: their mean."""
        return OneHead(self.salience(), self.keys())

    def projected(self) -> torch.Tensor:
        """See the protocol."""
        return self.units.projected(self.which).rows

    def merged(self, removed: Sequence[int]) -> Merged:
        """Windows and merged patches forbid it (:meth:`.Reducer.bound` says so before)."""
        raise NotImplementedError
