"""Slot Attention off the critical path: on a stream of its own, as a CUDA graph for shapes that come often.

A pruner reads an early encoder layer, so its slot loop can run beside the layers that follow.
:class:`SlotRunner` starts it (:meth:`SlotRunner.begin`), and whoever needs the result joins
(:meth:`Pending.get`). Shapes that come often are captured (:mod:`ocvtp.pruner.admission`), and what is then
launched is three things: the first kernel, which takes the features from where they are to where the graph
reads them; the graph; and a copy, which takes the results out.

The graph ends where the slots' top tokens are known. Selection and the rows' gather follow in one launch, on
the caller's stream: they wait for the consumed layer, whose output is somewhere else in memory every time,
and a graph of one kernel saves nothing over its launch.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.pruner.admission import WINDOW, Admission
from ocvtp.pruner.assignment import Assignment, Plan
from ocvtp.pruner.lane import CaptureBusyError, Lane, can_never_record, lane_for, recorded_by_others
from ocvtp.pruner.pruner import OCPruner
from ocvtp.pruner.topup import Fill
from ocvtp.watch import OnInvalid
from ocvtp_kernels.slot_attention import Places

_log = logging.getLogger("ocvtp")

#: Shapes whose graphs are kept.
MOST_GRAPHS = 8
#: Tokens of all images of a call, up to which it is captured. The time to run the kernels grows with them,
#: that to launch them does not; and a graph keeps its memory. Where the two meet was estimated, not measured.
MOST_ROWS = 8192

Shape = tuple[object, ...]


@dataclass(frozen=True)
class Pending:
    """An assignment under way."""

    assignment: Assignment
    lane: Lane | None = None
    mark: Any = None

    def get(self) -> Assignment:
        """The assignment, for use on the caller's current stream. Does not block."""
        top = self.assignment.top
        if self.lane is not None:
            made = top if top is not None else (self.assignment.attention,)
            self.lane.join(self.mark, [tensor for tensor in made if tensor is not None])
        return self.assignment


class _Parameters:
    """Names the tensors that a plan reads, while they live: compared and hashed at no cost."""

    def __init__(self, plan: Plan) -> None:
        self._first = weakref.ref(plan.weights.query_weight), weakref.ref(plan.start.queries)

    def are_of(self, plan: Plan) -> bool:
        """Whether the plan reads these."""
        weight, queries = self._first
        return weight() is plan.weights.query_weight and queries() is plan.start.queries

    @property
    def alive(self) -> bool:
        """Whether there may be such a plan again."""
        return all(tensor() is not None for tensor in self._first)


@dataclass(frozen=True)
class _Graph:
    """One captured shape. It holds its plan: the kernels read those very tensors."""

    plan: Plan
    x: torch.Tensor  # [B, N, C], normalised
    places: Places
    replay: Callable[[], None]

    def serves(self, plan: Plan) -> bool:
        """Whether it was made of the same parameters."""
        return self.plan.weights.query_weight is plan.weights.query_weight

    def run(self, plan: Plan, features: torch.Tensor) -> Assignment:
        """The assignment of ``features``; results are a copy, which the next replay leaves alone."""
        plan.normalise(features, self.x)
        self.replay()
        return plan.assignment(features, self.places.clone().top)


class SlotRunner:
    """Runs :meth:`OCPruner.assign` beside the caller, for one model and its threads.

    A shape is run as it is at first (which also compiles its kernels), captured at its third call among the
    last 64, and replayed from then on; :class:`~ocvtp.pruner.admission.Admission` has the rest. Results are
    copies: they stay what they are. Without a GPU, under ``torch.compile``, inside someone else's capture, in
    training mode, and where PyTorch computes instead of kernels, it simply assigns.

    A capture that fails is tried again later, unless CUDA says that it can't be.

    Args:
        capture: capture graphs; ``False`` only uses the side stream.
    """

    def __init__(self, capture: bool = True) -> None:
        self._capture = capture
        self._lock = threading.Lock()
        self._lanes: dict[torch.device, Lane | None] = {}
        self._graphs: dict[Shape, _Graph] = {}
        self._admission: Admission[Shape] = Admission(MOST_GRAPHS)
        self._parameters: list[_Parameters] = []
        self._last: tuple[Plan, _Parameters] | None = None
        self._refused = False
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty: graphs belong to this process and its pruner."""
        return type(self), (self._capture,)

    @property
    def graphs(self) -> int:
        """How many shapes are captured."""
        return len(self._graphs)

    @torch.no_grad()
    def begin(
        self,
        pruner: OCPruner,
        features: torch.Tensor,
        keep: int,
        *,
        seed: int = 0,
        backend: str = "auto",
        precision: str = "auto",
        return_attention: bool = False,
        refine: int = 0,
        fill: Fill = "attention",
        on_invalid: OnInvalid = "raise",
    ) -> Pending:
        """Start ``pruner.assign(features, keep, ...)``, whose arguments and errors these are."""
        features = features.detach()
        plan = pruner.prepare(
            features,
            keep,
            seed=seed,
            backend=backend,
            precision=precision,
            return_attention=return_attention,
            fill=fill,
            refine=refine,
            on_invalid=on_invalid,
        )
        fork = _branch()
        if fork is not None:
            fork.held.append(plan)
        if plan.resolved != "triton" or pruner.training:
            return Pending(plan.run(features))
        if fork is not None:
            assignment = fork.lane.run(functools.partial(plan.run, features), [features])
            return Pending(assignment, fork.lane, fork.lane.mark())
        if recorded_by_others(features.device):
            return Pending(plan.run(features))
        with self._lock:
            lane = None if self._closed else self._lane(features.device)
            if lane is None:
                return Pending(plan.run(features))
            parameters = self._known(plan, lane)
            capture = self._capture and not plan.needs_map and features.shape[:2].numel() <= MOST_ROWS
            graph = self._graph(plan, parameters, features, lane) if capture else None
            run = plan.run if graph is None else functools.partial(graph.run, plan)
            work = functools.partial(run, features)
            assignment = lane.run(work, [features])
            return Pending(assignment, lane, lane.mark())

    def beside(
        self, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]
    ) -> Callable[[], torch.Tensor] | None:
        """Start ``work`` beside the caller, who gets what it makes by calling what this returns.

        ``None``, and nothing is started, where there is only one thing at a time.

        Args:
            work: is done without gradients.
            reads: tensors that it reads and that the caller may give up meanwhile.
        """
        fork, device = _branch(), reads[0].device
        if fork is not None:
            return _begun(fork.lane, work, reads)
        if recorded_by_others(device):
            return None
        with self._lock:
            lane = None if self._closed else self._lane(device)
            return None if lane is None else _begun(lane, work, reads)

    def close(self) -> None:
        """Give the graphs and their memory back; later calls run uncaptured."""
        with self._lock:
            self._closed = True
            self._drop(list(self._graphs))
            self._lanes.clear()
            self._last = None

    def _lane(self, device: torch.device) -> Lane | None:
        if device not in self._lanes:
            self._lanes[device] = lane_for(device)
        return self._lanes[device]

    def _known(self, plan: Plan, lane: Lane) -> _Parameters:
        """A name for what the plan reads; the lane will have read it before its memory is given away."""
        if self._last is not None:  # nearly always the same
            last, parameters = self._last
            if last.weights is plan.weights and last.start is plan.start:
                return parameters
        lane.hold((*plan.weights, *plan.start))
        found = next((one for one in self._parameters if one.are_of(plan)), None)
        if found is None:
            found = _Parameters(plan)
            self._parameters = [*(one for one in self._parameters if one.alive), found]
        self._last = plan, found
        return found

    def _graph(
        self, plan: Plan, parameters: _Parameters, features: torch.Tensor, lane: Lane
    ) -> _Graph | None:
        """The graph for such features, if there is one or it is time to make it."""
        shape = (features.device, tuple(features.shape), *plan.key(), parameters)
        self._admission.note(shape)
        if self._admission.calls % WINDOW == 0:
            self._drop([old for old in self._admission.unseen() if not self._graphs[old].serves(plan)])
        graph = self._graphs.get(shape)
        if graph is not None:
            return graph
        if not self._admission.due(shape):
            return None
        try:
            graph = _captured(plan, features, lane)
        except CaptureBusyError:
            self._admission.busy()
            return None
        except RuntimeError as error:
            self._failed(error)
            return None
        self._refused = False
        gone = self._admission.admit(shape)
        self._graphs[shape] = graph
        if gone is not None:
            self._drop([gone])
        return graph

    def _failed(self, error: RuntimeError) -> None:
        """Try again later; but not if it can't be, which takes saying twice in a row.

        Somebody else's capture in PyTorch's usual mode makes CUDA refuse ours in the very same words.
        """
        refused, self._refused = self._refused, can_never_record(error)
        if refused and self._refused:
            self._capture = False
            _log.warning("the pruner runs without CUDA graphs, which can't be captured here: %s", error)
        else:
            self._admission.failed()
            _log.info("a CUDA graph of the pruner could not be captured now: %s", error)

    def _drop(self, shapes: Sequence[Shape]) -> None:
        for shape in shapes:
            self._admission.dismiss(shape)
        going = [self._graphs.pop(shape) for shape in shapes]
        if going:  # and may still be running
            for lane in self._lanes.values():
                if lane is not None:
                    lane.wait()


@torch.no_grad()
def _begun(
    lane: Lane, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]
) -> Callable[[], torch.Tensor]:
    made = lane.run(work, reads)
    mark = lane.mark()

    def get() -> torch.Tensor:
        lane.join(mark, [made])
        return made

    return get


@dataclass(frozen=True)
class _Fork:
    """A branch of what somebody records."""

    lane: Lane
    held: list[object]


_fork: contextvars.ContextVar[_Fork | None] = contextvars.ContextVar("_fork", default=None)


def _branch() -> _Fork | None:
    """Of what this thread records."""
    return None if torch.compiler.is_compiling() else _fork.get()  # which torch.compile can't trace


@contextlib.contextmanager
def forking(lane: Lane, held: list[object]) -> Iterator[None]:
    """Runners of this thread run beside it on ``lane``, without graphs: the caller records all of it in one.

    Args:
        lane: nobody else's.
        held: filled with what has to live as long as the graph: weights and constants that it reads.
    """
    token = _fork.set(_Fork(lane, held))
    try:
        yield
    finally:
        _fork.reset(token)


def _captured(plan: Plan, features: torch.Tensor, lane: Lane) -> _Graph:
    # Outside of a surrounding inference mode, whose tensors nobody could write to later.
    with torch.inference_mode(False), torch.no_grad():

        def warmed() -> tuple[torch.Tensor, Places]:
            x = torch.zeros(features.shape, dtype=plan.weights.query_weight.dtype, device=features.device)
            places = plan.places(features)
            plan.find(x, places)  # what it has to compile or load can't be captured
            return x, places

        x, places = lane.run(warmed, [])
        _, replay = lane.record(lambda: plan.find(x, places))
    return _Graph(plan, x, places, replay)
