"""LLaVA-OneVision: tiled images that are shrunk if they have too many tiles, and videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.contracts.rows import KeptRows, Piece, Projected, Segment
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.families.llava import Pictures
from ocvtp.vlm.families.llava_next import LlavaNextAdapter, Tiled, newline_of
from ocvtp.vlm.layouts.packing import Packing, shrink


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Candidates are what ``LlavaOnevisionModel`` packs: shrunk where it shrinks, without newlines.

    Features and scores of a shrunk token are interpolated from those of the patches, as the model does with
    its projected features; the projector then has to run on all patches. A prompt of several images has them
    uncut. Frames of a video are shrunk to a quarter of their tokens; the video's newline always stays.
    """

    pixel_keys: Mapping[str, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
    vision_keys = (
        *LlavaNextAdapter.vision_keys,
        "vision_aspect_ratio",
        "batch_num_images",
        "image_sizes_videos",
    )
    projects_tokens = False

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        inner = self.model.model
        return [
            *super().bypassed_methods(),
            ("get_video_features", self.model, "get_video_features"),
            ("model.get_video_features", inner, "get_video_features"),
            ("model.apply_pooling", inner, "apply_pooling"),
        ]

    def vision(self, modality: str, arguments: Mapping[str, Any], settings: Settings) -> Vision:
        """Images as for LLaVA-NeXT, or ``pixel_values_videos`` ``[videos, frames, 3, H, W]``."""
        if modality == "video":
            return _Videos(self, arguments["pixel_values_videos"], arguments, settings)
        return super().vision(modality, arguments, settings)

    def tiled(
        self,
        pixels: torch.Tensor,
        packings: Sequence[Packing],
        arguments: Mapping[str, Any],
        settings: Settings,
    ) -> Vision:
        """See :class:`~ocvtp.vlm.families.llava_next.LlavaNextAdapter`."""
        return _Shrinking(self, pixels, packings, arguments, settings)

    def output(self, kept: KeptRows, modality: str) -> Any:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`; videos come as one tensor.

        Raises:
            ValueError: videos of different numbers of kept tokens.
        """
        made = super().output(kept, modality)
        if modality == "video":
            if len({len(rows) for rows in kept.rows}) > 1:
                raise ValueError(
                    "videos that keep different numbers of tokens can't go into one call of this model: give "
                    'keep a number or a share rather than "auto", or pass one video at a time'
                )
            made.pooler_output = torch.stack(made.pooler_output)
        return made


class _Shrinking(Tiled):
    """Images cut into tiles (:class:`~ocvtp.vlm.contracts.adapter.Vision`)."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        whole = indices.shape[1] == self.segments[which[0]].tokens
        if whole or all(self.packings[i].shrunk is None for i in which):
            return super().rows(which, indices, taken)
        projected = self.all_projected()
        rows = [self.packed(projected, i)[indices[j].to(projected.device)] for j, i in enumerate(which)]
        return self.pieces(which, rows, indices)


class _Videos(Pictures):
    """Every frame is a picture (:class:`~ocvtp.vlm.contracts.adapter.Vision`)."""

    def __init__(
        self,
        adapter: LlavaOnevisionAdapter,
        pixel_values: torch.Tensor,
        arguments: Mapping[str, Any],
        settings: Settings,
    ) -> None:
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values_videos must be [videos, frames, 3, H, W]; got {list(pixel_values.shape)}"
            )
        super().__init__(adapter, pixel_values.flatten(0, 1), arguments, settings)
        if self.shape is None:
            raise ValueError("frames can be shrunk if their features are those of all patches")
        self._newline = newline_of(adapter.model)
        self._shrunk: torch.Tensor | None = None  # projected candidates of all segments
        videos, frames = pixel_values.shape[:2]
        self._side = math.ceil(self.shape[0] / 2)
        self._tokens = self._side**2  # of a frame
        each = settings.frames == "each"
        self._parts = frames if each else 1  # segments of a video
        part = self._tokens if each else frames * self._tokens
        shape = (part // self._side, self._side)
        self.segments = [Segment(i, part, shape) for i in range(videos) for _ in range(self._parts)]
        self.totals = [frames * self._tokens + 1] * videos

    @property
    def key(self) -> tuple[object, ...]:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`."""
        return (super().key, len(self.segments), *self.totals)

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return self._of(self.read, which)

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; of every frame its attention sums to the same."""
        return self._of(self.received(backend)[:, :, None], which)[:, :, 0]

    def source(self, which: Sequence[int]) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; the projector comes before the shrinking."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        shrunk = self._all_shrunk()
        found = []
        for j, i in enumerate(which):
            index = indices[j].to(shrunk.device)
            found.append(self._piece(i, shrunk[i][index], index, None))
        return found

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return Projected(some_of(self._all_shrunk(), which))

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; there are none."""
        raise NotImplementedError("frames are shrunk after the projector")

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return [
            self._piece(i, made.rows[j], indices[j], None if mass is None else mass[j])
            for j, i in enumerate(which)
        ]

    def _all_shrunk(self) -> torch.Tensor:
        """Projected candidates of all segments, once a call."""
        if self._shrunk is None:
            self._shrunk = self._of(self.all_projected(), range(len(self.segments)))
        return self._shrunk

    def _of(self, tokens: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """Candidates: ``[frames, N, C] -> [segments, n, C]``."""
        assert self.shape is not None
        small = shrink(tokens, self.shape, (self._side, self._side))
        return some_of(small.reshape(len(self.segments), -1, tokens.shape[2]), which)

    def _piece(
        self, segment: int, rows: torch.Tensor, indices: torch.Tensor, mass: torch.Tensor | None
    ) -> Piece:
        """Rows of a segment at its candidates ``indices``, and behind the last segment the newline."""
        part = segment % self._parts
        slots = indices + part * self.segments[0].tokens
        if part == self._parts - 1:  # the video's newline
            rows = torch.cat([rows, self._newline.to(rows)[None]])
            slots = torch.cat([slots, slots.new_full((1,), self.totals[0] - 1)])
            mass = None if mass is None else torch.nn.functional.pad(mass, (0, 1), value=1.0)
        return Piece(rows[None], slots[None], mass=None if mass is None else mass[None])
