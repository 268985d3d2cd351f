"""From pixels to the rows that are kept: tower, choice and projector, in the order that lets them overlap."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ocvtp.selection import Selection
from ocvtp.vlm.contracts.adapter import Adapter, Vision
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.pixels import pixels_in
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.rows import KeptRows, Piece, Segment, assemble
from ocvtp.vlm.contracts.selector import Begun, Group, Selector
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.contracts.weights import inside
from ocvtp.vlm.encode.questions import Asking
from ocvtp.vlm.encode.reducing import handed_over, reduced
from ocvtp.vlm.encode.standing import owners, stand_for
from ocvtp.vlm.encode.timing import Clock, stage
from ocvtp.watch import Watch, watching


def encode(
    adapter: Adapter,
    arguments: Mapping[str, Any],
    settings: Settings,
    clock: Clock | None,
    *,
    calling: Sequence[Any] = (),
    asking: Asking | None = None,
) -> dict[str, KeptRows]:
    """Encode and prune what ``arguments`` bring along, by modality.

    Args:
        adapter: of the model.
        arguments: of a call.
        settings: of the call.
        clock: times the stages, if one runs.
        calling: modules whose calls are under way (``generate`` is no call).
        asking: tells the questions, to methods that read them.

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
        for modality, vision in visions.items():
            asked = _asked(settings, asking, adapter.token_id(modality), vision)
            kept[modality] = _rows_of(vision, settings, clock, asked)
        return tuple(tensor for rows in kept.values() for tensor in rows.tensors())

    pixels = (arguments[key] for key in keys.values())
    made = iter(inside(adapter.around(arguments, settings), run, *pixels, calling=calling))
    return {modality: rows.made_of(made) for modality, rows in kept.items()}


def _rows_of(
    vision: Vision, settings: Settings, clock: Clock | None, asked: list[torch.Tensor] | None
) -> KeptRows:
    """Replayed, if the whole vision side is recorded and can be."""
    if settings.graphs is not None and clock is None and asked is None:
        found = settings.graphs.rows(vision, functools.partial(_told, settings), settings.watch)
        if found is not None:
            return found
    return prune_rows(vision, settings, clock, asked)


def _told(settings: Settings, vision: Any, watch: Watch) -> KeptRows:
    """:func:`prune_rows`, with somebody else told of images that are not finite."""
    return prune_rows(vision, replace(settings, watch=watch))


def _asked(
    settings: Settings, asking: Asking | None, token_id: int, vision: Vision
) -> list[torch.Tensor] | None:
    """The question about each image or video, where somebody reads it."""
    reads = isinstance(settings.selector, Reducer) and settings.selector.reads_prompt
    return asking(token_id, vision.totals) if reads and asking is not None else None


def choose(
    adapter: Adapter,
    arguments: Mapping[str, Any],
    settings: Settings,
    *,
    return_attention: bool = False,
    asking: Asking | None = None,
) -> list[Selection]:
    """Run tower and choice only: what is kept of each group of images, outside of the model's call."""
    found: list[Selection] = []

    def choice(pixels: torch.Tensor) -> tuple[()]:
        vision = adapter.vision("image", {**arguments, key: pixels}, settings)
        asked = _asked(settings, asking, adapter.token_id("image"), vision)
        with _watched(settings):
            for group, selection in _choices(vision, settings, asked, return_attention=return_attention):
                standing = settings.standing
                found.append(_with_owners(vision, group, selection, settings) if standing else selection)
        return ()

    key = adapter.pixel_keys["image"]
    inside(adapter.around(arguments, settings), choice, arguments[key])
    return found


def prune_rows(
    vision: Vision,
    settings: Settings,
    clock: Clock | None = None,
    questions: Sequence[torch.Tensor] | None = None,
) -> KeptRows:
    """Tower, choice and projector of the images (or the videos) of a call.

    Args:
        vision: of the images.
        settings: of the call.
        clock: times the stages, if one runs.
        questions: ids of the text that asks about each image or video, for rival methods that read it.
    """
    with _watched(settings):
        if isinstance(settings.selector, Reducer):
            return _reduce_rows(vision, settings.selector, settings, clock, questions)
        return _choose_rows(vision, settings.selector, settings, clock)


def _watched(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Images that are not finite are told to the model's watch; a call begins.

    Raises:
        ValueError: an earlier call's were not.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    settings.watch.start()
    return watching(settings.watch)


def _choose_rows(vision: Vision, selector: Selector, settings: Settings, clock: Clock | None) -> KeptRows:
    """:func:`prune_rows` by a pruner or a rule."""
    run = _Run(vision, selector, settings, clock)
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


def _reduce_rows(
    vision: Vision,
    reducer: Reducer,
    settings: Settings,
    clock: Clock | None,
    questions: Sequence[torch.Tensor] | None,
) -> KeptRows:
    """:func:`prune_rows` by a rival method, which follows the tower or runs it."""
    groups = groups_of(vision.segments, settings.budget)
    with stage(clock, "vision tower", vision.device):
        if not reducer.in_tower or any(group.keep == group.tokens for group in groups):
            vision.run(None, None)
    with stage(clock, "vision tower" if reducer.in_tower else "pruner", vision.device):
        chosen = [_left(vision, reducer, group, questions) for group in groups]
    with stage(clock, "projector", vision.device):
        made = []
        for group, selection in zip(groups, chosen, strict=True):
            if selection.reduction is None:
                pieces = _rows(vision, group.which, selection.indices, None, settings)
            else:
                projects = not reducer.behind
                pieces = handed_over(vision, group.which, selection.reduction, settings, projects=projects)
            made += list(_matched(group.which, pieces))
    return assemble(vision.segments, vision.totals, made)


def _left(
    vision: Vision, reducer: Reducer, group: Group, questions: Sequence[torch.Tensor] | None
) -> Selection:
    """What a rival method leaves of a group, all of it if that is within the budget."""
    if group.keep != group.tokens:
        return reduced(vision, reducer, group, questions)
    indices = torch.arange(group.tokens, device=vision.device).expand(len(group.which), -1)
    return Selection(indices, indices.new_zeros(len(indices)), tokens=group.tokens)


def _choices(
    vision: Vision,
    settings: Settings,
    questions: Sequence[torch.Tensor] | None,
    *,
    return_attention: bool,
) -> Iterator[tuple[Group, Selection]]:
    """What is kept of each group, after the tower ran."""
    selector = settings.selector
    if not isinstance(selector, Reducer):
        run = _Run(vision, selector, settings, None, return_attention=return_attention)
        for i, group in enumerate(run.groups):
            yield group, run.choice(i).select(run.scores(i))
        return
    if return_attention:
        raise ValueError(f"{selector.title} has no slots, so there is no slot attention to return")
    if not selector.in_tower:
        vision.run(None, None)
    for group in groups_of(vision.segments, settings.budget):
        yield group, _left(vision, selector, group, questions)


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
        self,
        vision: Vision,
        selector: Selector,
        settings: Settings,
        clock: Clock | None,
        *,
        return_attention: bool = False,
    ) -> None:
        self.groups = groups_of(vision.segments, settings.budget)
        self._vision, self._selector, self._settings = vision, selector, settings
        self._begun: list[Begun] = []

        def start() -> None:
            self._begun = [self._begin(group, return_attention) for group in self.groups]

        with stage(clock, "vision tower", vision.device):
            if clock is None:
                vision.run(selector.read_layer, start, selector.beside if selector.reads_scores else None)
            else:  # while somebody measures, the stages follow one another
                vision.run(selector.read_layer, None)
        if not self._begun:
            with stage(clock, "pruner", vision.device):
                start()

    def _begin(self, group: Group, return_attention: bool) -> Begun:
        selector, vision = self._selector, self._vision
        features = None if selector.read_layer is None else vision.features(group.which)
        return selector.begin(group, features, vision.device, return_attention=return_attention)

    def choice(self, group: int) -> Any:
        """The choice of a group, for use now."""
        return self._begun[group].get()

    def scores(self, group: int) -> torch.Tensor | None:
        """Fill scores of a group."""
        if not self._selector.reads_scores:
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
