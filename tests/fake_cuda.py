"""Streams, graphs and what PyTorch keeps about them, without a GPU: enough to see who leaves what behind.

The rules are those of PyTorch's CUDAGraph, its default generator and its allocator, 2.7 to 2.13, the harshest
of each: a recording that does not end well leaves random numbers and the memory pool "being recorded"; such
a pool takes no other recording, nor does one that was given up, nor a stream that records already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

CAPTURE_UNSUPPORTED = "CUDA error: operation not permitted when stream is capturing"
CAPTURE_INVALIDATED = "CUDA error: operation failed due to a previous error during capture"


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str, device: torch.device, priority: int = 0) -> None:
        self.cuda, self.name, self.device, self.priority = cuda, name, device, priority

    def __repr__(self) -> str:
        return self.name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self} waits for {other}")

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(f"{self} waits for {event}")

    def record_event(self) -> str:
        return f"mark of {self}"

    def synchronize(self) -> None:
        self.cuda.log.append(f"the host waits for {self}")


class FakeGraph:
    """Fails where ``cuda.fails`` says, once for each time that it is said."""

    def __init__(self) -> None:
        self.device = FakeCuda.now.current_device()
        self.stream: FakeStream | None = None
        self.pool_id: tuple[int, int] | None = None
        self.ended = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = FakeCuda.now
        assert capture_error_mode == "thread_local"
        stream = cuda.current_stream()
        self.pool_id = cuda.graph_pool_handle() if pool is None else pool
        if self.pool_id in cuda.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if cuda.users.get(self.pool_id) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        cuda.random_is_recorded = True
        cuda.users[self.pool_id] = cuda.users.get(self.pool_id, 0) + 1
        cuda.recording.add(self.pool_id)
        cuda.fail_if("begin", CAPTURE_UNSUPPORTED)
        assert stream not in cuda.capturing
        self.stream = stream
        cuda.capturing.append(stream)
        cuda.log.append(f"record on {stream}")

    def capture_end(self) -> None:
        cuda = FakeCuda.now
        if cuda.current_stream() is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        cuda.capturing.remove(self.stream)
        cuda.fail_if("end", CAPTURE_INVALIDATED)
        assert self.pool_id is not None
        cuda.recording.remove(self.pool_id)
        cuda.random_is_recorded = False
        self.ended = True
        cuda.fail_if("instantiate", "CUDA error: out of memory")
        cuda.log.append("recorded")

    def reset(self) -> None:
        if self.ended:
            assert self.pool_id is not None
            FakeCuda.now.users[self.pool_id] -= 1
            self.ended = False

    def __del__(self) -> None:
        self.reset()

    def replay(self) -> None:
        if FakeCuda.now.random_is_recorded:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        FakeCuda.now.log.append(f"replay on {FakeCuda.now.current_stream()}")


class _Within:
    """A context that sets something for the thread and sets it back."""

    def __init__(self, get: Callable[[], Any], set_: Callable[[Any], None], value: Any) -> None:
        self.get, self.set, self.value = get, set_, value

    def __enter__(self) -> None:
        self.before = self.get()
        self.set(self.value)

    def __exit__(self, *_: object) -> None:
        self.set(self.before)


class FakeCuda:
    """What stands for ``torch.cuda``; :meth:`left` tells what should not be there."""

    now: FakeCuda

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: list[str] = []
        self.capturing: list[FakeStream] = []
        self.recording: set[tuple[int, int]] = set()
        self.users: dict[tuple[int, int], int] = {}
        self.random_is_recorded = False
        self._pools = 0
        self._streams = 0
        self._thread = threading.local()
        self.defaults = [FakeStream(self, f"stream 0 of {index}", torch.device("cpu")) for index in range(2)]
        FakeCuda.now = self

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "device",
            "stream",
            "current_stream",
            "graph_pool_handle",
            "is_current_stream_capturing",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        for name in ("synchronize", "empty_cache", "graph"):
            monkeypatch.setattr(torch.cuda, name, self._forbidden)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self._release_pool, raising=False)
        monkeypatch.setattr(torch.Tensor, "record_stream", self._record_stream)

    def _forbidden(self, *_: Any, **__: Any) -> None:
        raise AssertionError("it waits for the whole device, or throws its cache away")

    def _record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"kept for {stream}")

    def _end_pool(self, device: Any, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _release_pool(self, device: Any, pool: tuple[int, int]) -> None:
        self.users[pool] -= 1
        assert self.users[pool] >= 0

    def fail_if(self, where: str, message: str) -> None:
        if where in self.fails:
            self.fails.remove(where)
            raise RuntimeError(message)

    def graph_pool_handle(self) -> tuple[int, int]:
        self._pools += 1
        return (0, self._pools)

    def new_stream(self, device: Any = None, priority: int = 0) -> FakeStream:
        self._streams += 1
        return FakeStream(self, f"side {self._streams}", torch.device("cpu"), priority)

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def current_stream(self, device: Any = None) -> FakeStream:
        return getattr(self._thread, "stream", self.defaults[self.current_device()])

    def device(self, device: Any) -> _Within:
        index = torch.device(device).index or 0
        return _Within(self.current_device, lambda value: setattr(self._thread, "device", value), index)

    def stream(self, stream: FakeStream) -> _Within:
        return _Within(self.current_stream, self.set_stream, stream)

    def set_stream(self, stream: FakeStream) -> None:
        self._thread.stream = stream

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream() in self.capturing

    def left(self) -> list[str]:
        """What recording left behind."""
        found = [f"{stream} records" for stream in self.capturing]
        if self.random_is_recorded:
            found.append("no random numbers")
        found += [f"memory of {pool} is being recorded" for pool in self.recording]
        if self.current_stream() not in self.defaults:
            found.append(f"current is {self.current_stream()}")
        if self.current_device():
            found.append("another device is current")
        return found
