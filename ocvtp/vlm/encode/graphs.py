"""The whole vision side as one CUDA graph: tower, pruner beside it, choice, projector.

An eager tower of 24 layers is some 300 launches from Python, and takes longer to launch than to run for an
image or two. :class:`VisionGraphs` records them for pixels of a shape that comes often, and replays.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.pruner.admission import Admission
from ocvtp.pruner.capture import forking
from ocvtp.pruner.lane import CaptureBusyError, Lane, can_never_record, lane_for, recorded_by_others
from ocvtp.vlm.contracts.rows import KeptRows
from ocvtp.vlm.contracts.steady import Steady
from ocvtp.vlm.encode.watched import Watched, why_unsteady
from ocvtp.watch import OnInvalid, Watch

_log = logging.getLogger("ocvtp")

#: Shapes whose graphs are kept. They share the memory that they compute in; each has its pixels and results.
MOST_GRAPHS = 4


@dataclass(frozen=True)
class _Graph:
    """A recorded vision side.

    Attributes:
        watched: its modules.
        pixels: what it reads.
        made: what it writes, see :func:`_tensors`.
        replay: runs it.
        like: a call's rows, of which ``made`` has others.
        held: what it reads and nobody else may hold.
    """

    watched: Watched
    pixels: torch.Tensor
    made: tuple[torch.Tensor, ...]
    replay: Callable[[], None]
    like: _Like
    held: tuple[object, ...]

    def run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies of the results, which the next replay leaves alone."""
        self.pixels.copy_(pixels)
        self.replay()
        return tuple(tensor.clone() for tensor in self.made)


class _Notes(Watch):
    """Keeps flags that a call leaves: when it is replayed they are somebody's to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.flags: list[torch.Tensor] = []
        self.said: list[tuple[str, OnInvalid]] = []

    def start(self) -> None:
        """Nothing is told here."""

    def look(self) -> None:
        """Nothing is told here."""

    def note(self, sound: torch.Tensor, message: str, on_invalid: OnInvalid = "raise") -> None:
        """See :class:`~ocvtp.watch.Watch`."""
        self.flags.append(sound.detach().reshape(-1))
        self.said.append((message, on_invalid))


@dataclass(frozen=True)
class _Like:
    """What rows of a call are, but for their tensors; and what its flags mean, which follow those."""

    said: list[tuple[str, OnInvalid]]
    counts: list[int]
    totals: tuple[int, ...]
    levels: int
    weighed: bool

    def rows(self, made: Sequence[torch.Tensor]) -> KeptRows:
        """Rows made of :func:`_tensors`."""
        flat, slots, *rest = made
        deep = tuple(level.split(self.counts) for level in rest[: self.levels])
        mass = rest[self.levels] if self.weighed else None
        return KeptRows(tuple(flat.split(self.counts)), slots, self.totals, deep, mass)

    def tell(self, watch: Watch, made: Sequence[torch.Tensor]) -> None:
        """Have the flags looked at."""
        if self.said:
            for flags, (message, on_invalid) in zip(made[-len(self.said) :], self.said, strict=True):
                watch.note(flags, message, on_invalid)


def _like(kept: KeptRows, notes: _Notes) -> _Like:
    counts = [len(rows) for rows in kept.rows]
    return _Like(notes.said, counts, kept.totals, len(kept.deep), kept.mass is not None)


def _tensors(kept: KeptRows, notes: _Notes) -> tuple[torch.Tensor, ...]:
    """All rows, slots, then DeepStack rows by layer, then masses if there are, then flags."""
    deep = (torch.cat(level) for level in kept.deep)
    made = (kept.flat(), kept.slots, *deep, *(() if kept.mass is None else (kept.mass,)), *notes.flags)
    return tuple(tensor.contiguous() for tensor in made)


class VisionGraphs:
    """Replays the vision side of one model (:class:`~ocvtp.vlm.contracts.steady.Replays`).

    A shape is run as it is at first, recorded at its third call among the last 64, and replayed from then on
    (:class:`~ocvtp.pruner.admission.Admission`). Where a call can't be replayed, it is run, and the log says
    why, once for each reason. Results are copies.

    Args:
        parts: all modules of the vision side.
        inner: the model that they are of, for weights of its own.
        pruner: that chooses, if one does.
    """

    def __init__(
        self, parts: Sequence[torch.nn.Module], inner: torch.nn.Module, pruner: torch.nn.Module | None
    ) -> None:
        self._parts, self._inner, self._pruner = list(parts), inner, pruner
        self._lock = threading.Lock()
        self._lanes: dict[torch.device, tuple[Lane, Lane] | None] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._admission: Admission[Hashable] = Admission(MOST_GRAPHS)
        self._said: set[str] = set()
        self._refused = False
        self._capture = True
        self._closed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionGraphs:
        """For a copy of the model: graphs are of this one."""
        parts, inner, pruner = copy.deepcopy((self._parts, self._inner, self._pruner), memo)
        return type(self)(parts, inner, pruner)

    @property
    def graphs(self) -> int:
        """How many are recorded."""
        return len(self._graphs)

    def rows(self, vision: object, prune: Callable[[Any, Watch], KeptRows], watch: Watch) -> KeptRows | None:
        """See :class:`~ocvtp.vlm.contracts.steady.Replays`."""
        if torch.compiler.is_compiling() or not isinstance(vision, Steady) or self._closed:
            return None
        reason = self._why_not(vision.pixels)
        if reason is not None:
            self._say(reason)
            return None
        with self._lock:
            if self._closed:
                return None
            lanes = self._lanes_on(vision.pixels.device)
            if lanes is None:
                self._say(f"the pixels are on {vision.pixels.device}")
                return None
            graph = self._graph(vision, prune, *lanes)
            if graph is None:
                return None
            watch.start()
            lane = lanes[0]
            made = lane.run(functools.partial(graph.run, vision.pixels), [vision.pixels])
            lane.join(lane.mark(), made)
        graph.like.tell(watch, made)
        return graph.like.rows(made)

    def close(self) -> None:
        """See :class:`~ocvtp.vlm.contracts.steady.Replays`."""
        with self._lock:
            self._closed = True
            self._drop(list(self._graphs))
            self._lanes.clear()

    def _why_not(self, pixels: torch.Tensor) -> str | None:
        """Why this call can't be replayed."""
        if recorded_by_others(pixels.device):
            return "somebody else records it"
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return "a mode of PyTorch wants to see its operators"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a transform of torch.func goes through it"
        if torch.is_autocast_enabled(pixels.device.type):
            return "autocast keeps what it casts"
        if any(part.training for part in self._parts) or (self._pruner is not None and self._pruner.training):
            return "it is in training mode"
        if torch.is_grad_enabled() and self._wants_gradients(pixels):
            return "gradients are wanted: call it under torch.no_grad(), as generate does"
        return None

    def _wants_gradients(self, pixels: torch.Tensor) -> bool:
        return pixels.requires_grad or any(
            parameter.requires_grad
            for part in self._parts
            for parameter in (*part.parameters(), *self._inner._parameters.values())
            if parameter is not None
        )

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning('capture="vision": the vision side runs without a CUDA graph: %s', reason)

    def _lanes_on(self, device: torch.device) -> tuple[Lane, Lane] | None:
        """Where graphs run, and where a branch of one runs while it is recorded."""
        if device not in self._lanes:
            both = lane_for(device), lane_for(device)
            self._lanes[device] = None if both[0] is None or both[1] is None else (both[0], both[1])
        return self._lanes[device]

    def _graph(
        self, vision: Steady, prune: Callable[[Any, Watch], KeptRows], lane: Lane, side: Lane
    ) -> _Graph | None:
        """The graph for such a call, if there is one or it is time to make it."""
        pixels = vision.pixels
        shape = (pixels.shape, pixels.stride(), pixels.dtype, pixels.device)
        attention = (
            getattr(getattr(part, "config", None), "_attn_implementation", None) for part in self._parts
        )
        key = (type(vision), vision.key, *shape, *attention, _numerics())
        self._admission.note(key)
        graph = self._graphs.get(key)
        if graph is not None:
            if graph.watched.same():
                return graph
            # Some weight is another tensor, a module was replaced, a hook was put on: the others' as well.
            self._drop([one for one, graph in self._graphs.items() if not graph.watched.same()])
            self._admission.note(key)
        if not self._capture or not self._admission.due(key):
            return None
        reason = why_unsteady([*self._parts, *([] if self._pruner is None else [self._pruner])])
        if reason is not None:
            self._say(reason)
            self._admission.failed()  # to look at all modules takes longer than a call may
            return None
        try:
            graph = self._recorded(vision, prune, lane, side)
        except CaptureBusyError:
            self._admission.busy()
            return None
        except Exception as error:  # what is wrong with the call itself, running it will say
            self._failed(error)
            return None
        self._refused = False
        gone = self._admission.admit(key)
        if gone is not None:
            self._drop([gone])
        self._graphs[key] = graph
        return graph

    def _recorded(
        self, vision: Steady, prune: Callable[[Any, Watch], KeptRows], lane: Lane, side: Lane
    ) -> _Graph:
        held: list[object] = []
        likes: list[_Like] = []

        def work(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            notes = _Notes()
            with forking(side, held):
                kept = prune(vision.on(pixels), notes)
            likes.append(_like(kept, notes))
            return _tensors(kept, notes)

        def warmed() -> torch.Tensor:
            pixels = torch.empty_like(vision.pixels).copy_(vision.pixels)
            work(pixels)  # what it has to compile, load or allocate for good can't be recorded
            return pixels

        # Outside of a surrounding inference mode, whose tensors nobody could write to later.
        with torch.inference_mode(False), torch.no_grad():
            watched = Watched(self._parts, [self._inner], [] if self._pruner is None else [self._pruner])
            pixels = lane.run(warmed, [vision.pixels])
            held.append(vision.on(pixels))  # constants of its layout
            made, replay = lane.record(functools.partial(work, pixels))
        return _Graph(watched, pixels, made, replay, likes[-1], tuple(held))

    def _failed(self, error: Exception) -> None:
        """Try again later; but not if CUDA says twice in a row that it can't be."""
        refused, self._refused = self._refused, can_never_record(error)
        if refused and self._refused:
            self._capture = False  # graphs that there are go on being replayed
            self._say(f"it can't be captured here: {error}")
        else:
            self._admission.failed()
            _log.info("a CUDA graph of the vision side could not be captured now: %s", error)

    def _drop(self, keys: Sequence[Hashable]) -> None:
        if keys:  # what is dropped may still be running
            for lanes in self._lanes.values():
                if lanes is not None:
                    lanes[0].wait()
        for key in keys:
            self._admission.dismiss(key)
            del self._graphs[key]


def _numerics() -> tuple[object, ...]:
    """Settings of PyTorch by which the same operators choose other kernels."""
    cuda = torch.backends.cuda
    found: list[object] = [
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    ]
    with contextlib.suppress(RuntimeError):  # newer releases refuse to tell after both spellings were used
        found.append(torch.get_float32_matmul_precision())
    return tuple(found)
