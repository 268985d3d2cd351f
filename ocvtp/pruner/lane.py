"""Streams beside the caller's, and work recorded as CUDA graphs.

:func:`record_graph` is what everything here that captures goes through. ``torch.cuda.graph`` leaves a thread
on the capturing stream when a capture fails (its ``__exit__`` raises before it restores), waits for the whole
device and empties the allocator's cache; this does none of it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

Made = TypeVar("Made")

# PyTorch records one graph at a time in a process (torch/cuda/graphs.py); a second one breaks both.
_recording = threading.Lock()
_choosing = threading.Lock()
_streams: weakref.WeakSet[torch.cuda.Stream] = weakref.WeakSet()  # of lanes
# Graphs whose recording failed. PyTorch's allocators may go on asking them which memory is theirs.
_wrecks: list[torch.cuda.CUDAGraph] = []


class CaptureBusyError(RuntimeError):
    """Another graph is being recorded in this process; later there will be time."""


class Lane(Protocol):
    """A stream beside the caller's, and a way to record what runs on it."""

    def run(self, work: Callable[[], Made], reads: Sequence[torch.Tensor]) -> Made:
        """Do ``work`` after everything the caller's stream has been told to do. ``reads``: its inputs."""

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Whatever becomes of them: their memory is not given away before all work here is done.

        For what many calls read. Costs nothing from the second time on.
        """

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """Record ``work`` without doing it: its results' places, and what does it again, within :meth:`run`.

        Raises:
            RuntimeError: it can't be recorded (now); nothing is left of the attempt.
        """

    def mark(self) -> Any:
        """A point to :meth:`join` at: everything that :meth:`run` was given so far."""

    def join(self, mark: Any, results: Sequence[torch.Tensor]) -> None:
        """Let the caller's stream wait for ``mark`` before it uses ``results``."""

    def wait(self) -> None:
        """Wait until nothing runs here."""


class CudaLane:
    """A side stream of one GPU. Its graphs share a memory pool: they run on it, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of_its_own(device)
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._held: dict[int, weakref.ref[torch.Tensor]] = {}
        self._most_held = 128

    def run(self, work: Callable[[], Made], reads: Sequence[torch.Tensor]) -> Made:
        """See :class:`Lane`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                return work()
        finally:  # some of it may run even if it raised
            for tensor in reads:  # their memory is not given away before this stream has read them
                tensor.record_stream(self._stream)

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """See :class:`Lane`."""
        for tensor in tensors:
            held = self._held.get(id(tensor))
            if held is None or held() is not tensor:
                tensor.record_stream(self._stream)  # looked at when its memory is freed, not now
                self._held[id(tensor)] = weakref.ref(tensor)
        if len(self._held) > self._most_held:
            self._held = {key: held for key, held in self._held.items() if held() is not None}
            self._most_held = 2 * len(self._held) + 128

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """See :class:`Lane`."""
        alive = list(self._graphs)  # and kept so: PyTorch can't record into a pool that was given up
        if not alive:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            made, graph = record_graph(work, self._stream, self._pool)
        except CaptureBusyError:
            raise
        except BaseException:
            self._graphs.clear()  # and take another pool next time
            raise
        self._graphs.add(graph)
        return made, graph.replay

    def mark(self) -> Any:
        """See :class:`Lane`."""
        return self._stream.record_event()

    def join(self, mark: Any, results: Sequence[torch.Tensor]) -> None:
        """See :class:`Lane`."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in results:
            tensor.record_stream(current)

    def wait(self) -> None:
        """See :class:`Lane`."""
        self._stream.synchronize()


def _stream_of_its_own(device: torch.device) -> torch.cuda.Stream:
    """One of high priority, that no other lane has: it would record what the other one runs.

    PyTorch lends streams from a pool of 32 for each priority, in turn. Few others ask for this one.
    """
    with _choosing:
        for _ in range(32):
            stream = torch.cuda.Stream(device, priority=-1)
            if stream not in _streams:
                break
        _streams.add(stream)
        return stream


# What CUDA and HIP say of work that can't be recorded: 801, 900, 902, 904 and 905 of cudaError_t. Not 901,
# which follows from anything, another thread's doing too.
_NEVER = (
    "operation not supported",
    "operation not permitted when stream is capturing",
    "merge of separate capture sequences",
    "capturing stream has unjoined work",
    "dependency created on uncaptured work in another stream",
)


def can_never_record(error: BaseException) -> bool:
    """Whether an error of :func:`record_graph` is about the work, and not about the moment."""
    return any(words in str(error) for words in _NEVER)


def lane_for(device: torch.device) -> Lane | None:
    """A lane on ``device``, or ``None`` where there is only one thing at a time."""
    return CudaLane(device) if device.type == "cuda" else None


def recorded_by_others(device: torch.device) -> bool:
    """Whether what runs on ``device`` now is being recorded as a whole by somebody else."""
    if torch.compiler.is_compiling():
        return True
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def record_graph(
    work: Callable[[], Made], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[Made, torch.cuda.CUDAGraph]:
    """Record what ``work`` does on ``stream`` as a CUDA graph, without doing it.

    Whatever fails, the thread's streams and device are what they were, and so are PyTorch's allocator and its
    random numbers. Nothing waits for the GPU. What ``work`` compiles or sets up on its first run can't be
    recorded: run it before, on a side stream.

    Args:
        work: makes tensors, which :meth:`torch.cuda.CUDAGraph.replay` fills from then on. It must leave no
            stream behind that it forked and did not join.
        stream: not a default one.
        pool: from ``torch.cuda.graph_pool_handle``, of graphs that run one after another; ``None`` makes one.
            One that failed, or whose graphs are all gone, can't be used again.

    Raises:
        CaptureBusyError: another thread is recording with this function.
        Exception: what ``work`` raised.
        RuntimeError: CUDA can't record, or could not just now.
    """
    if not _recording.acquire(blocking=False):  # not to wait: the other may wait for a lock that we hold
        raise CaptureBusyError("another CUDA graph is being recorded")
    try:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            attempt = _Attempt(stream, pool)
            attempt.begin()
            try:
                made = work()
            except BaseException:
                with contextlib.suppress(Exception):  # it follows from what was raised first
                    attempt.end()
                raise
            attempt.end()
            return made, attempt.graph
    finally:
        _recording.release()


class _Attempt:
    """One recording, and what to do if it fails."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._spare = torch.empty(1, device=stream.device)  # here, since there may be no memory later

    def begin(self) -> None:
        try:
            # Only this thread must abstain from what can't be recorded; others may allocate meanwhile.
            self.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except BaseException:
            self._clean_up()
            raise

    def end(self) -> None:
        try:
            with torch.cuda.stream(self._stream):  # whatever stream the work has left current
                self.graph.capture_end()
        except BaseException:
            self._clean_up()
            raise

    def _clean_up(self) -> None:
        """Undo what PyTorch (2.7 to 2.13) does not when beginning or ending raises."""
        _wrecks.append(self.graph)
        with contextlib.suppress(Exception):
            self.graph.reset()
        # The allocator believes that it records for the pool: it defers frees, and refuses the pool later.
        with contextlib.suppress(Exception):
            end = getattr(torch._C, "_cuda_endAllocateToPool", None)
            if end is None:  # PyTorch 2.7
                end = torch._C._cuda_endAllocateCurrentStreamToPool  # type: ignore[attr-defined]
            end(self._stream.device.index, self._pool)  # raises where it does not
            torch._C._cuda_releasePool(self._stream.device.index, self._pool)
        # So does the default generator of random numbers, which refuses to draw any, also in older graphs,
        # until a recording succeeds (pytorch/pytorch#171263).
        with contextlib.suppress(Exception), torch.cuda.stream(self._stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            self._spare.zero_()  # PyTorch warns of empty ones
            graph.capture_end()
