"""LLaVA-NeXT (LLaVA-1.6): an image is a small whole picture and tiles of it, chosen from together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.rows import Piece, Projected, Segment
from ocvtp.vlm.contracts.settings import Newlines, Settings
from ocvtp.vlm.families.llava import LlavaAdapter, Pictures
from ocvtp.vlm.layouts.packing import Packing, alone, ended_lines, packed_piece, packed_tokens


class LlavaNextAdapter(LlavaAdapter):
    """Tower on all tiles -> one choice per image -> projector on the kept rows.

    With ``layout="layout"`` candidates are the tokens that ``LlavaNextModel.pack_image_features`` packs, in
    its order: tokens that only pad the image to the tiles' grid are gone. With ``"official"`` they are all
    tokens of all tiles, tile by tile, and one newline follows, as in the published code. In both, an image
    that keeps all its candidates stays as the model packs it.
    """

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
        made = self.layout.packings(sizes, arguments, pixels.device)
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
        adapter.layout.check_square(arguments)
        self._newline = newline_of(adapter.model)
        self._newlines: Newlines = settings.newlines
        self._official = settings.layout == "official"
        self.packings = packings
        self._first = [sum(one.tiles for one in packings[:i]) for i in range(len(packings))]
        self.totals = [one.total for one in packings]
        self.segments = [Segment(i, self._candidates(one)) for i, one in enumerate(packings)]
        if self._official:
            self._check_room(settings)

    @property
    def key(self) -> tuple[object, ...]:
        """See :class:`~ocvtp.vlm.contracts.steady.Steady`: sizes decide how an image is cut and packed."""
        sizes = ((one.tiles, one.grid, one.stitched, one.shrunk, one.total) for one in self.packings)
        return (super().key, *sizes)

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

    def evidence(self, which: Sequence[int]) -> Evidence:
        """See :class:`~ocvtp.vlm.contracts.evidence.Telling`: tile by tile."""
        tiles = self.packings[which[0]].tiles
        pictures = [self._first[i] + tile for i in which for tile in range(tiles)]
        return self.witness(pictures, tiles, [self.packings[i].grid for i in which])

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
        if whole:
            return [self.piece(i, projected[j], None) for j, i in enumerate(which)]
        return self.pieces(which, projected, indices)

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
        return self.pieces(which, made.rows, indices, mass)

    def _of(self, tokens: torch.Tensor, image: int) -> torch.Tensor:
        """Candidates of an image: ``[tiles, N, C] -> [candidates, C]``."""
        if self._official:
            return self._tiles(tokens, image).flatten(0, 1)
        return self.packed(tokens, image)

    def packed(self, tokens: torch.Tensor, image: int) -> torch.Tensor:
        """What the model packs of an image, without newlines, of ``tokens`` ``[tiles, N, C]``."""
        return packed_tokens(self.packings[image], self._tiles(tokens, image))

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

    def pieces(
        self,
        which: Sequence[int],
        rows: Sequence[torch.Tensor] | torch.Tensor,
        indices: torch.Tensor,
        mass: torch.Tensor | None = None,
    ) -> list[Piece]:
        """Rows of images that drop candidates, with their newlines.

        Args:
            which: images.
            rows: ``[k, D]`` of each.
            indices: ``[images, k]``, the candidates they are of.
            mass: ``[images, k]``, how many candidates each row stands for.
        """
        ended: Sequence[torch.Tensor | None] = [None] * len(which)
        if self._newlines == "rows" and not self._official:
            ended = ended_lines([self.packings[i] for i in which], indices.unbind(0))
        masses = [None] * len(which) if mass is None else mass.unbind(0)
        return [self.piece(i, rows[j], indices[j], masses[j], ended[j]) for j, i in enumerate(which)]

    def piece(
        self,
        image: int,
        rows: torch.Tensor,
        indices: torch.Tensor | None,
        mass: torch.Tensor | None = None,
        ended: torch.Tensor | None = None,
    ) -> Piece:
        """An image's rows with its newlines; ``indices``: candidates they are of, ``None`` for all."""
        one = self.packings[image]
        if indices is not None and self._official:
            slots = torch.arange(len(rows) + 1, device=rows.device)  # only their number matters
            line = self._newline.to(rows)[None]
            masses = None if mass is None else alone(mass, 1)[None]
            return Piece(torch.cat([rows, line])[None], slots[None], mass=masses)
        return packed_piece(one, rows, self._newline, indices, self._newlines, mass, ended)
