"""LLaVA-NeXT (LLaVA-1.6): an image is a small whole picture and tiles of it, chosen from together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.adapter import Family, TowerFacts, Vision
from ocvtp.vlm.contracts.rows import Piece, Projected, Segment
from ocvtp.vlm.contracts.settings import Newlines, Settings
from ocvtp.vlm.families.llava import LlavaAdapter, Pictures, tower_tokens
from ocvtp.vlm.families.tiles import Packing, packing


class LlavaNextAdapter(LlavaAdapter):
    """Tower on all tiles -> one choice per image -> projector on the kept rows.

    With ``layout="layout"`` candidates are the tokens that ``LlavaNextModel.pack_image_features`` packs, in
    its order: tokens that only pad the image to the tiles' grid are gone. With ``"official"`` they are all
    tokens of all tiles, tile by tile, and one newline follows, as in the published code. In both, an image
    that keeps all its candidates stays as the model packs it.
    """

    options = frozenset({"layout", "newlines", "tower"})

    def facts(self, arguments: Mapping[str, Any]) -> TowerFacts:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`; images differ in size."""
        return dataclasses.replace(super().facts(arguments), tokens=None, extra_rows=0)

    def check(self, settings: Settings) -> None:
        """Raise ``ValueError`` for settings that contradict each other, or features that make no picture."""
        Family.check(self, settings)
        self.check_square({})
        if settings.layout == "official":
            if settings.positions == "original":
                raise ValueError(
                    'layout="official" keeps padding, which has no position in the long prompt: use '
                    'positions="compact"'
                )
            if settings.newlines != "last":
                raise ValueError('layout="official" has one newline, the last')

    def check_square(self, arguments: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless the features of a tile are its patches, all and nothing else."""
        first, class_rows = self.prefix(arguments)
        patches = tower_tokens(self.tower) - first
        if class_rows or math.isqrt(patches) ** 2 != patches:
            raise ValueError(
                "tiles can be packed if all patches and nothing else are features of the tower; this "
                f"vision_feature_select_strategy leaves {patches + class_rows} of each tile"
            )

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Adapter`."""
        packing_method = ("model.pack_image_features", self.model.model, "pack_image_features")
        return [*super().bypassed_methods(), packing_method]

    def vision(self, modality: str, arguments: Mapping[str, Any], settings: Settings) -> Vision:
        """``pixel_values`` ``[images, most tiles, 3, H, W]`` (or all tiles, 4-D), and ``image_sizes``.

        Raises:
            ValueError: arguments that don't describe images of this model.
        """
        sizes = arguments.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes is missing: pass everything that the processor made")
        if isinstance(sizes, torch.Tensor):
            sizes = sizes.tolist()
        pixels = arguments["pixel_values"]
        made = self.packings(sizes, arguments, pixels.device)
        tiles = [one.tiles for one in made]
        if pixels.ndim == 5 and len(pixels) == len(made) and pixels.shape[1] >= max(tiles):
            pixels = torch.cat([picture[:count] for picture, count in zip(pixels, tiles, strict=True)])
        elif pixels.ndim != 4 or len(pixels) != sum(tiles):
            raise ValueError(
                f"pixel_values {list(pixels.shape)} don't hold {len(made)} image(s) of {tiles} tiles, which "
                "image_sizes calls for"
            )
        return self.tiled(pixels, made, arguments, settings)

    def tiled(
        self,
        pixels: torch.Tensor,
        packings: Sequence[Packing],
        arguments: Mapping[str, Any],
        settings: Settings,
    ) -> Vision:
        """All tiles of all images ``[tiles, 3, H, W]``, to be encoded."""
        return Tiled(self, pixels, packings, arguments, settings)

    def packings(
        self, sizes: Sequence[Sequence[int]], arguments: Mapping[str, Any], device: torch.device
    ) -> list[Packing]:
        """How images of these ``(height, width)`` are packed."""
        config = self.model.config
        grids = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        return [packing(int(h), int(w), grids, tile, tile // patch, device) for h, w in sizes]


def newline_of(model: Any) -> torch.Tensor:
    """``[D]``, the row that ends a line of tokens.

    Raises:
        ValueError: it has no values, since it is no part of a module that DeepSpeed would gather it for.
    """
    newline: torch.Tensor = model.model.image_newline
    if not newline.numel():
        raise ValueError(
            f"DeepSpeed's ZeRO-3 holds image_newline of this {type(model).__name__} in parts, and pruning "
            "reads it outside of the call that would bring it: use ZeRO-2 or FSDP2"
        )
    return newline


class Tiled(Pictures):
    """Images cut into tiles (:class:`~ocvtp.vlm.contracts.adapter.Vision`).

    Attributes:
        packings: of the images.
    """

    def __init__(
        self,
        adapter: LlavaNextAdapter,
        pixel_values: torch.Tensor,
        packings: Sequence[Packing],
        arguments: Mapping[str, Any],
        settings: Settings,
    ) -> None:
        super().__init__(adapter, pixel_values, arguments, settings)
        adapter.check_square(arguments)
        self._newline = newline_of(adapter.model)
        self._newlines: Newlines = settings.newlines
        self._official = settings.layout == "official"
        self.packings = packings
        self._first = [sum(one.tiles for one in packings[:i]) for i in range(len(packings))]
        self.totals = [one.total for one in packings]
        self.segments = [Segment(i, self._candidates(one)) for i, one in enumerate(packings)]
        if self._official:
            self._check_room(settings)

    def _candidates(self, one: Packing) -> int:
        return one.tiles * self.patches if self._official else len(one.slots)

    def _check_room(self, settings: Settings) -> None:
        for segment, total in zip(self.segments, self.totals, strict=True):
            keep = settings.budget.of(segment.tokens)
            most = keep if isinstance(keep, int) else max(n for n in (0, *keep) if n < segment.tokens)
            if total <= most < segment.tokens:
                raise ValueError(
                    f'layout="official" can\'t keep {most} tokens and a newline of an image that has '
                    f"{total} placeholders in the prompt"
                )

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return torch.stack([self._of(self.read, i) for i in which])

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; a tile's attention sums to 1, so they compare."""
        received = self.received(backend)[:, :, None]
        return torch.stack([self._of(received, i)[:, 0] for i in which])

    def source(self, which: Sequence[int]) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; kept rows are taken straight from the tiles."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        whole = indices.shape[1] == self.segments[which[0]].tokens
        if whole and not self.hold:
            packed = self.all_projected()  # as upstream does, to the bit
            return [self.piece(i, self.packed(packed, i), None) for i in which]
        kept = [self._tokens(i, None if whole else indices[j]) for j, i in enumerate(which)]
        taken_rows = self.run_projector(self.taken_flat(torch.cat(kept)))
        projected = taken_rows.split([len(tokens) for tokens in kept])
        return [self.piece(i, projected[j], None if whole else indices[j]) for j, i in enumerate(which)]

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return Projected(torch.stack([self._of(self.all_projected(), i) for i in which]))

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return (torch.stack([self._of(self.all_outputs(), i) for i in which]),)

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        return [
            self.piece(i, made.rows[j], indices[j], None if mass is None else mass[j])
            for j, i in enumerate(which)
        ]

    def _of(self, tokens: torch.Tensor, image: int) -> torch.Tensor:
        """Candidates of an image: ``[tiles, N, C] -> [candidates, C]``."""
        if self._official:
            return self._tiles(tokens, image).flatten(0, 1)
        return self.packed(tokens, image)

    def packed(self, tokens: torch.Tensor, image: int) -> torch.Tensor:
        """What the model packs of an image, without newlines, of ``tokens`` ``[tiles, N, C]``."""
        flat = self.packings[image].tokens.to(tokens.device)
        tile = torch.div(flat, self.patches, rounding_mode="floor")
        return self._tiles(tokens, image)[tile, flat % self.patches]

    def _tiles(self, tokens: torch.Tensor, image: int) -> torch.Tensor:
        first = self._first[image]
        return tokens[first : first + self.packings[image].tiles]

    def _tokens(self, image: int, indices: torch.Tensor | None) -> torch.Tensor:
        """Candidates ``indices`` of an image (``None``: what the model packs), counted through all tiles."""
        flat = self.packings[image].tokens
        if indices is not None:
            indices = indices.to(flat.device)
            flat = indices if self._official else flat[indices]
        tile = self._first[image] + torch.div(flat, self.patches, rounding_mode="floor")
        return tile * (self.patches + self.prefix) + self.prefix + flat % self.patches

    def piece(
        self,
        image: int,
        rows: torch.Tensor,
        indices: torch.Tensor | None,
        mass: torch.Tensor | None = None,
    ) -> Piece:
        """An image's rows with its newlines; ``indices``: candidates they are of, ``None`` for all."""
        one = self.packings[image]
        if indices is not None and self._official:
            slots = torch.arange(len(rows) + 1, device=rows.device)  # only their number matters
            masses = None if mass is None else _alone(mass, 1)[None]
            return Piece(torch.cat([rows, self._lines(rows, 1)])[None], slots[None], mass=masses)
        if indices is None:
            slots, newlines = one.slots, one.newlines
        else:
            indices = indices.to(one.slots.device)
            slots, newlines = one.slots[indices], self._kept_newlines(one, indices)
        slots = torch.cat([slots, newlines])
        rows = torch.cat([rows, self._lines(rows, len(newlines))])
        mass = None if mass is None else _alone(mass, len(newlines))
        if indices is None or self._newlines != "last":
            slots, order = slots.sort()
            rows = rows[order.to(rows.device)]
            mass = None if mass is None else mass[order.to(mass.device)]
        return Piece(rows[None], slots[None], mass=None if mass is None else mass[None])

    def _kept_newlines(self, one: Packing, indices: torch.Tensor) -> torch.Tensor:
        if self._newlines == "last":
            return one.newlines[-1:]
        if self._newlines == "all":
            return one.newlines
        lines = one.rows[indices]
        ended = torch.zeros(len(one.newlines) + 1, dtype=torch.bool, device=lines.device)
        ended[lines] = True  # -1, the whole picture, ends at the spare place
        return one.newlines[ended[:-1]]

    def _lines(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """``[count, D]`` newlines."""
        return self._newline.to(rows).expand(count, -1)


def _alone(mass: torch.Tensor, more: int) -> torch.Tensor:
    """``[k + more]``: rows that the model adds stand for nobody but themselves."""
    return torch.nn.functional.pad(mass, (0, more), value=1.0)
