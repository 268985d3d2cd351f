"""The images of one encoder call, as the selection wants to see them.

vLLM's encoder runs as it is, on everything; of the rows it makes, kept ones are handed on, alone or as means
of those that they stand for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ocvtp.serving.vllm.taps import Tap, Tower, tapped
from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.contracts.rows import Piece, Projected, Segment
from ocvtp.vlm.contracts.selector import Beside
from ocvtp.vlm.contracts.settings import Newlines
from ocvtp.vlm.layouts.packing import Packing, ended_lines, packed_piece, packed_tokens
from ocvtp.vlm.layouts.qwen_geometry import Geometry
from ocvtp.vlm.layouts.squares import grouped
from ocvtp_kernels._device import on_device
from ocvtp_kernels.selection import gather_tokens


class Encoded:
    """What the families have in common (:class:`~ocvtp.vlm.contracts.adapter.Vision`).

    Args:
        tower: of the model.
        encode: runs vLLM's encoder; returns the rows of each image, ``[rows, D]``.
        segments: what is chosen among.
        totals: rows of each image.
        device: of the pixels.
    """

    def __init__(
        self,
        tower: Tower,
        encode: Callable[[], Any],
        segments: Sequence[Segment],
        totals: Sequence[int],
        device: torch.device,
    ) -> None:
        self.segments, self.totals, self.device = segments, totals, device
        self._tower, self._encode = tower, encode
        self._images: list[torch.Tensor] = []
        self._read: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None
        self._tap: Tap | None = None

    def run(
        self, read_layer: int | None, after: Callable[[], None] | None, beside: Beside | None = None
    ) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; scores follow vLLM's encoder."""

        def read(output: torch.Tensor) -> None:
            self._read = self.candidates(output)
            if after is not None:
                after()

        with tapped(self._tower, read_layer, read) as self._tap:
            self._images = list(self._encode())
        if (read_layer is not None and self._read is None) or not self._tap.full:
            raise RuntimeError(
                "ocvtp: this vLLM runs its vision tower around our hooks, so nobody knows what passes it. "
                "docs/serving.md says which versions are served"
            )

    def features(self, which: Sequence[int]) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        assert self._read is not None
        return self.of(self._read, which)

    def scores(self, which: Sequence[int], backend: str) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        if self._scores is None:
            assert self._tap is not None
            self._scores = self.received(self._tap, backend)
        return self.of(self._scores[..., None], which)[..., 0]

    def source(self, which: Sequence[int]) -> None:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; vLLM has projected all rows already."""

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        made = self.projected(which)
        kept = (gather_tokens(every, indices.to(every.device)) for every in (made.rows, *made.deep))
        rows, *deep = kept
        return self.place(which, indices, Projected(rows, tuple(deep)), None)

    def sources(self, which: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; vLLM runs its projector itself."""
        raise NotImplementedError("vLLM runs its projector itself")

    def project(self, which: Sequence[int], sources: tuple[torch.Tensor, ...]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`; vLLM runs its projector itself."""
        raise NotImplementedError("vLLM runs its projector itself")

    # What a family says.

    def candidates(self, output: torch.Tensor) -> torch.Tensor:
        """What is chosen among, from a layer's output. It is not written to later."""
        raise NotImplementedError

    def received(self, tap: Tap, backend: str) -> torch.Tensor:
        """Attention received, aligned with :meth:`candidates`."""
        raise NotImplementedError

    def of(self, tensor: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """Segments of :meth:`candidates`: ``[segments, N, C]``."""
        return some_of(tensor, which)

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        raise NotImplementedError

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`~ocvtp.vlm.contracts.adapter.Vision`."""
        raise NotImplementedError


class Pictures(Encoded):
    """LLaVA-1.5: every picture is an image.

    Args:
        prefix: tokens before the first candidate.
        class_rows: how many of them are handed over nevertheless.
    """

    def __init__(self, *args: Any, prefix: int, class_rows: int = 0) -> None:
        super().__init__(*args)
        self._prefix, self._class_rows = prefix, class_rows

    def candidates(self, output: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoded`."""
        return output[:, self._prefix :].clone()

    def received(self, tap: Tap, backend: str) -> torch.Tensor:
        """See :class:`Encoded`."""
        return tap.received(backend)[:, self._prefix :]

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`Encoded`."""
        return Projected(torch.stack([self._images[i][self._class_rows :] for i in which]))

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`Encoded`."""
        rows = made.rows
        if self._class_rows:
            first = torch.stack([self._images[i][: self._class_rows] for i in which])
            rows = torch.cat([first, rows], dim=1)
            own = torch.arange(self._class_rows, device=indices.device).expand(len(indices), -1)
            indices = torch.cat([own, indices + self._class_rows], dim=1)
        return [Piece(rows, indices, mass=mass)]


class Tiles(Pictures):
    """LLaVA-NeXT, LLaVA-OneVision: an image is packed from tiles, one after another in the batch.

    Args:
        packings: of the images.
        newlines: which stay.
    """

    def __init__(self, *args: Any, packings: Sequence[Packing], newlines: Newlines, prefix: int) -> None:
        super().__init__(*args, prefix=prefix)
        self._packings, self._newlines = packings, newlines
        self._first = list(itertools.accumulate((one.tiles for one in packings), initial=0))

    def of(self, tensor: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """See :class:`Encoded`."""
        images = ((self._packings[i], tensor[self._first[i] : self._first[i + 1]]) for i in which)
        return torch.stack([packed_tokens(one, tiles) for one, tiles in images])

    def rows(self, which: Sequence[int], indices: torch.Tensor, taken: torch.Tensor | None) -> list[Piece]:
        """See :class:`Encoded`; an image that keeps all stays as vLLM packs it."""
        if indices.shape[1] < self.segments[which[0]].tokens:
            return super().rows(which, indices, taken)
        everything = torch.arange(self.totals[which[0]], device=indices.device)[None]
        return [Piece(self._images[i][None], everything) for i in which]

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`Encoded`."""
        images = ((self._images[i], self._packings[i].slots) for i in which)
        return Projected(torch.stack([rows[slots.to(rows.device)] for rows, slots in images]))

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`Encoded`."""
        ended: Sequence[torch.Tensor | None] = [None] * len(which)
        if self._newlines == "rows":
            ended = ended_lines([self._packings[i] for i in which], indices.unbind(0))
        found = []
        for j, i in enumerate(which):
            newline = self._images[i][-1]  # vLLM packs an image so that it ends in one
            one = self._packings[i]
            found.append(packed_piece(one, made.rows[j], newline, indices[j], self._newlines, None, ended[j]))
        return found


class Squares(Encoded):
    """Pictures that are chosen from one by one, tokens of ``unit x unit`` patches.

    Args:
        side: patches along a picture.
        unit: patches along a token.
        prefix: tokens of a picture before its first patch.
    """

    def __init__(self, *args: Any, side: int, unit: int, prefix: int) -> None:
        super().__init__(*args)
        self._side, self._unit, self._prefix = side, unit, prefix
        items = [segment.item for segment in self.segments]
        tokens = self.segments[0].tokens
        self._offset = torch.tensor([(i - items.index(item)) * tokens for i, item in enumerate(items)])

    def candidates(self, output: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoded`."""
        return grouped(output[:, self._prefix :], self._side, self._unit).mean(2)

    def received(self, tap: Tap, backend: str) -> torch.Tensor:
        """See :class:`Encoded`."""
        scores = tap.received(backend)[:, self._prefix :, None]
        return grouped(scores, self._side, self._unit).sum(2)[..., 0]

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`Encoded`."""
        rows = [image.unflatten(0, (-1, self.segments[0].tokens)) for image in self._images]
        return Projected(some_of(torch.cat(rows), which))

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`Encoded`."""
        offset = on_device(some_of(self._offset, which), indices.device)[:, None]
        return [Piece(made.rows, indices + offset, mass=mass)]


class Units(Encoded):
    """Qwen-VL: patches of all images in one sequence, units of ``merge ** 2``, perhaps in windows' order.

    Args:
        merge: patches along a unit.
        plan: where the patches are.
        width: of the language model; rows that are wider hold DeepStack features too.
    """

    def __init__(self, *args: Any, merge: int, plan: Geometry, width: int) -> None:
        super().__init__(*args)
        self._plan, self._merge, self._width = plan, merge, width
        self._starts = list(itertools.accumulate((s.tokens for s in self.segments), initial=0))

    def candidates(self, output: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoded`; ``[units, C]``."""
        patches = output.reshape(-1, output.shape[-1])
        return self._original(patches.unflatten(0, (-1, self._merge**2)).mean(1))

    def received(self, tap: Tap, backend: str) -> torch.Tensor:
        """See :class:`Encoded`; ``[units]``, each image's scores sum to 1."""
        bounds = self._plan.frames.to(self.device, non_blocking=True)
        scores = tap.received(backend, bounds)[0]
        return self._original(scores.unflatten(0, (-1, self._merge**2)).sum(1))

    def _original(self, units: torch.Tensor) -> torch.Tensor:
        places = self._plan.places
        return units if places is None else units[places.to(units.device, non_blocking=True)]

    def of(self, tensor: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """See :class:`Encoded`."""
        return torch.stack([tensor[self._starts[i] : self._starts[i + 1]] for i in which])

    def projected(self, which: Sequence[int]) -> Projected:
        """See :class:`Encoded`."""
        rows, *deep = torch.stack([self._images[i] for i in which]).split(self._width, dim=-1)
        return Projected(rows.contiguous(), tuple(one.contiguous() for one in deep))

    def place(
        self, which: Sequence[int], indices: torch.Tensor, made: Projected, mass: torch.Tensor | None
    ) -> list[Piece]:
        """See :class:`Encoded`."""
        return [Piece(made.rows, indices, made.deep, mass)]
