"""From pixels to the rows that are kept: tower, choice and projector, in the order that lets them overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ocvtp.selection import Selection
from ocvtp.vlm.contracts.adapter import Adapter, Vision
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.pixels import pixels_in
from ocvtp.vlm.contracts.rows import KeptRows, Piece, Segment, assemble
from ocvtp.vlm.contracts.selector import Begun, Group
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.contracts.weights import inside
from ocvtp.vlm.encode.standing import owners, stand_for
from ocvtp.vlm.encode.timing import Clock, stage


def encode(
    adapter: Adapter,
    arguments: Mapping[str, Any],
    settings: Settings,
    clock: Clock | None,
    *,
    calling: Sequence[Any] = (),
) -> dict[str, KeptRows]:
    """Encode and prune what ``arguments`` bring along, by modality.

    Args:
        adapter: of the model.
        arguments: of a call.
        settings: of the call.
        clock: times the stages, if one runs.
        calling: modules whose calls are under way (``generate`` is no call).

    Raises:
        ValueError: arguments that don't describe images of this model.
    """
    keys = pixels_in(adapter, arguments)
    if not keys:
        return {}
    kept: dict[str, KeptRows] = {}

    def run(*pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {**arguments, **{key: pixels[i] for i, key in enumerate(keys.values())}}
        visions = {modality: adapter.vision(modality, given, settings) for modality in keys}
        kept.update({modality: prune_rows(vision, settings, clock) for modality, vision in visions.items()})
        return tuple(tensor for rows in kept.values() for tensor in rows.tensors())

    pixels = (arguments[key] for key in keys.values())
    made = iter(inside(adapter.around(arguments, settings), run, *pixels, calling=calling))
    return {modality: rows.made_of(made) for modality, rows in kept.items()}


def choose(
    adapter: Adapter, arguments: Mapping[str, Any], settings: Settings, *, return_attention: bool = False
) -> list[Selection]:
    """Run tower and choice only: what is kept of each group of images, outside of the model's call."""
    found: list[Selection] = []

    def choice(pixels: torch.Tensor) -> tuple[()]:
        vision = adapter.vision("image", {**arguments, key: pixels}, settings)
        run = _Run(vision, settings, None, return_attention=return_attention)
        for i, group in enumerate(run.groups):
            selection = run.choice(i).select(run.scores(i))
            found.append(_with_owners(vision, group, selection, settings) if settings.standing else selection)
        return ()

    key = adapter.pixel_keys["image"]
    inside(adapter.around(arguments, settings), choice, arguments[key])
    return found


def prune_rows(vision: Vision, settings: Settings, clock: Clock | None = None) -> KeptRows:
    """Tower, choice and projector of the images (or the videos) of a call.

    Args:
        vision: of the images.
        settings: of the call.
        clock: times the stages, if one runs.
    """
    run = _Run(vision, settings, clock)
    chosen = []
    with stage(clock, "pruner", vision.device):
        for i, group in enumerate(run.groups):
            choice, scores = run.choice(i), run.scores(i)
            source = None if settings.standing else vision.source(group.which)  # all are read then
            if source is None:
                selection, taken = choice.select(scores), None
            else:
                selection, taken = choice.select_rows(scores, source)
            chosen.append((group, selection, taken))
    with stage(clock, "projector", vision.device):
        made = [
            (which, piece)
            for group, selection, taken in chosen
            for part, indices, rows in _split(group, selection, taken)
            for which, piece in _matched(part, _rows(vision, part, indices, rows, settings))
        ]
    return assemble(vision.segments, vision.totals, made)


def _rows(
    vision: Vision,
    which: tuple[int, ...],
    indices: torch.Tensor,
    taken: torch.Tensor | None,
    settings: Settings,
) -> Sequence[Piece]:
    """Of kept candidates, for themselves or for all."""
    return (
        stand_for(vision, which, indices, settings)
        if settings.standing
        else vision.rows(which, indices, taken)
    )


def _with_owners(vision: Vision, group: Group, selection: Selection, settings: Settings) -> Selection:
    """The same, and for whom its tokens stand. Of kept tokens that are none, as ``mask`` says, for nobody."""
    if selection.indices.shape[1] == group.tokens and selection.mask is None:
        batch, tokens = selection.indices.shape
        every = torch.arange(tokens, device=selection.indices.device).expand(batch, -1)
        return replace(selection, mass=torch.ones_like(every, dtype=torch.float32), owner=every)
    found = owners(vision, group.which, selection.indices, settings, selection.mask)
    return replace(selection, mass=found.mass, owner=found.owner)


class _Run:
    """The tower's run, with the choices it has started."""

    def __init__(
        self, vision: Vision, settings: Settings, clock: Clock | None, *, return_attention: bool = False
    ) -> None:
        self.groups = groups_of(vision.segments, settings.budget)
        self._vision, self._settings = vision, settings
        self._begun: list[Begun] = []

        def start() -> None:
            self._begun = [self._begin(group, return_attention) for group in self.groups]

        with stage(clock, "vision tower", vision.device):
            # While somebody measures, the stages follow one another.
            vision.run(settings.selector.read_layer, start if clock is None else None)
        if not self._begun:
            with stage(clock, "pruner", vision.device):
                start()

    def _begin(self, group: Group, return_attention: bool) -> Begun:
        selector, vision = self._settings.selector, self._vision
        features = None if selector.read_layer is None else vision.features(group.which)
        return selector.begin(group, features, vision.device, return_attention=return_attention)

    def choice(self, group: int) -> Any:
        """The choice of a group, for use now."""
        return self._begun[group].get()

    def scores(self, group: int) -> torch.Tensor | None:
        """Fill scores of a group."""
        if not self._settings.selector.reads_scores:
            return None
        return self._vision.scores(self.groups[group].which, self._settings.backend)


def groups_of(segments: Sequence[Segment], budget: Budget) -> list[Group]:
    """Segments of equal size together, in the order of the first of each."""
    found: dict[tuple[int, tuple[int, int] | None], list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        found[segment.tokens, segment.shape].append(number)
    return [Group(tuple(which), tokens, shape, budget.of(tokens)) for (tokens, shape), which in found.items()]


def _split(
    group: Group, selection: Selection, taken: torch.Tensor | None
) -> Iterator[tuple[tuple[int, ...], torch.Tensor, torch.Tensor | None]]:
    """A selection by the numbers that its images keep."""
    if selection.count is None:
        yield group.which, selection.indices, taken
        return
    for i, count in enumerate(selection.count.tolist()):  # what each keeps is known to the device alone
        rows = None if taken is None else taken[i : i + 1, :count]
        yield group.which[i : i + 1], selection.indices[i : i + 1, :count], rows


def _matched(which: Sequence[int], pieces: Sequence[Any]) -> Iterator[tuple[Sequence[int], Any]]:
    """Pieces, which together are of ``which``, with the segments each of them is of."""
    start = 0
    for piece in pieces:
        stop = start + len(piece.slots)
        yield which[start:stop], piece
        start = stop
