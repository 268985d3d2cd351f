"""Slot Attention off the critical path: on a stream of its own, and from the second time on as a CUDA graph.

A pruner reads an early encoder layer, so its slot loop can run beside the layers that follow.
:class:`SlotRunner` starts it (:meth:`SlotRunner.begin`), and whoever needs the result joins
(:meth:`Pending.get`). Shapes that come back are captured: 17 launches become one.

The graph ends where the slots' top tokens are known. Selection and the rows' gather follow in one launch, on
the caller's stream: they wait for the consumed layer, whose output is somewhere else in memory every time,
and a graph of one kernel saves nothing over its launch.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.pruner.assignment import Assignment, Plan
from ocvtp.pruner.lane import Lane, lane_for, recorded_by_others
from ocvtp.pruner.pruner import OCPruner
from ocvtp.pruner.topup import Fill
from ocvtp_kernels.slot_attention import TopTokens

_log = logging.getLogger("ocvtp")

#: Shapes whose graphs are kept; the one not used for longest goes.
MOST_GRAPHS = 8
# Shapes remembered as seen once.
_MOST_SEEN = 256


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


@dataclass(frozen=True)
class _Graph:
    """One captured shape. It holds its plan: the kernels read those very tensors."""

    plan: Plan
    x: torch.Tensor
    top: TopTokens
    replay: Callable[[], None]

    def run(self, plan: Plan, features: torch.Tensor) -> Assignment:
        """The assignment of ``features``; results are copies, which the next replay leaves alone."""
        self.x.copy_(features)
        self.replay()
        return plan.assignment(features, TopTokens(*(tensor.clone() for tensor in self.top)))


class SlotRunner:
    """Runs :meth:`OCPruner.assign` beside the caller, for one model and its threads.

    A shape is run as it is the first time (which also compiles its kernels), captured the second time, and
    replayed from then on. Results are copies: they stay what they are. Without a GPU, under
    ``torch.compile``, inside someone else's capture, in training mode, and where PyTorch computes instead of
    kernels, it simply assigns.

    Args:
        capture: capture graphs; ``False`` only uses the side stream.
    """

    def __init__(self, capture: bool = True) -> None:
        self._capture = capture
        self._lock = threading.Lock()
        self._lanes: dict[torch.device, Lane | None] = {}
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        self._seen: OrderedDict[tuple[object, ...], None] = OrderedDict()
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
        )
        if plan.resolved != "triton" or pruner.training or recorded_by_others(features.device):
            return Pending(plan.run(features))
        with self._lock:
            lane = None if self._closed else self._lane(features.device)
            if lane is None:
                return Pending(plan.run(features))
            lane.hold((*plan.weights, *plan.start))  # parameters may change before the lane is done
            graph = self._graph(plan, features, lane) if self._capture and not plan.needs_map else None
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
        device = reads[0].device
        if recorded_by_others(device):
            return None
        with self._lock:
            lane = None if self._closed else self._lane(device)
            if lane is None:
                return None
            with torch.no_grad():
                made = lane.run(work, reads)
            mark = lane.mark()

        def get() -> torch.Tensor:
            lane.join(mark, [made])
            return made

        return get

    def close(self) -> None:
        """Give the graphs and their memory back; later calls run uncaptured."""
        with self._lock:
            self._closed = True
            self._drop(list(self._graphs))
            self._lanes.clear()

    def _lane(self, device: torch.device) -> Lane | None:
        if device not in self._lanes:
            self._lanes[device] = lane_for(device)
        return self._lanes[device]

    def _graph(self, plan: Plan, features: torch.Tensor, lane: Lane) -> _Graph | None:
        """The graph for such features; made the second time it is asked for."""
        shape = (features.device, features.dtype, tuple(features.shape), *plan.key())
        graph = self._graphs.get(shape)
        if graph is not None:
            if graph.plan.weights is plan.weights and graph.plan.start is plan.start:
                self._graphs.move_to_end(shape)
                return graph
            self._drop([shape])  # the pruner's parameters changed
        if shape not in self._seen:
            self._seen[shape] = None
            while len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
            return None
        try:
            self._graphs[shape] = graph = _captured(plan, features, lane)
        except RuntimeError as error:
            self._capture = False
            _log.warning("the pruner runs without CUDA graphs, capturing one failed: %s", error)
            return None
        self._drop(list(self._graphs)[:-MOST_GRAPHS])
        return graph

    def _drop(self, shapes: Sequence[tuple[object, ...]]) -> None:
        if shapes:  # what is dropped may still be running
            for lane in self._lanes.values():
                if lane is not None:
                    lane.wait()
        for shape in shapes:
            del self._graphs[shape]


def _captured(plan: Plan, features: torch.Tensor, lane: Lane) -> _Graph:
    # Outside of a surrounding inference mode, whose tensors nobody could write to later.
    with torch.inference_mode(False), torch.no_grad():

        def warmed() -> torch.Tensor:
            x = torch.zeros_like(features, memory_format=torch.contiguous_format)
            plan.run(x)  # what it has to compile or load can't be captured
            return x

        x = lane.run(warmed, [])

        def work() -> TopTokens:
            top = plan.run(x).top
            assert top is not None
            return top

        top, replay = lane.record(work)
    return _Graph(plan, x, top, replay)
