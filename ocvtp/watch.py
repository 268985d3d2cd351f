"""Which images of earlier calls were not finite, learnt without waiting for the GPU.

A check whose answer the host needs would wait for everything before it, and an assertion on the device ends
the process's CUDA context, with everything on it, for one bad image. So kernels survive NaN, and leave a flag
for each image. A :class:`Watch` has the flags copied to pinned memory behind the kernels, and reads those
that have arrived when the next call begins, or when somebody has waited anyway.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ocvtp_kernels._transforms import is_traced, values

_log = logging.getLogger("ocvtp")

#: What is done about an image with NaN or Inf: an error, or tokens spread evenly and a warning.
OnInvalid = Literal["raise", "grid"]
#: Calls whose flags are under way; beyond them the oldest are forgotten, and so are their errors.
MOST_PENDING = 64
_LEAST_IMAGES = 64


def check_on_invalid(on_invalid: object) -> OnInvalid:
    """``on_invalid``, or ``ValueError``."""
    for known in get_args(OnInvalid):
        if on_invalid == known:
            return known
    raise ValueError(f'on_invalid must be "raise" or "grid"; got {on_invalid!r}')


class Line:
    """From a device's memory to the host's, without waiting."""

    #: Whose memory.
    device_type = "cuda"

    def around(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """What the other methods are called in."""
        return torch.cuda.device(device)

    def recorded(self) -> bool:
        """Whether what happens on the current stream is recorded instead of done."""
        return torch.cuda.is_current_stream_capturing()

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device writes to by itself."""
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def event(self) -> Any:
        """With ``record()``, ``query()`` and ``synchronize()``."""
        return torch.cuda.Event()


_line = Line()


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the host may look at values at once; in compiled and exported code, when that runs."""
    return values(tensor).device.type == "cpu" != _line.device_type


@dataclass(frozen=True, eq=False)
class _Place:
    """Pinned memory for the flags of a call, and the event after which they are there."""

    flags: torch.Tensor
    arrived: Any


@dataclass(frozen=True, eq=False)
class _Note:
    """The flags of a call: where they arrive, of how many images, what they mean, and whose they are."""

    place: _Place
    images: int
    message: str
    on_invalid: OnInvalid
    caller: tuple[int, int]


@dataclass(frozen=True)
class _Found:
    """Which images of how many were not finite, why, what is done about it, and when that was."""

    images: list[int]
    total: int
    message: str
    on_invalid: OnInvalid
    when: str = ""

    def where(self) -> str:
        """``in this call, image [3] of 8``, counted from 0, as tensors are."""
        if self.total == 1:
            return f"{self.when}an image"
        which = ", ".join(map(str, self.images[:8])) + (", ..." if len(self.images) > 8 else "")
        return f"{self.when}image{'s' * (len(self.images) > 1)} [{which}] of {self.total}"


class Watch:
    """What calls of one model, or of one pruner, found wrong. Threads may share it; nothing here waits but
    :meth:`check`.

    Copies and pickles start empty: what is under way belongs to this process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[_Note] = deque()
        self._free: list[_Place] = []
        self._local = threading.local()
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        """See the class."""
        return type(self), ()

    def start(self) -> None:
        """A call begins in this thread: :meth:`look`, and what is noted from now on is its own.

        Raises:
            ValueError: see :meth:`look`.
        """
        self._local.calls = self._caller()[1] + 1
        self.look()

    def note(self, sound: torch.Tensor, message: str, on_invalid: OnInvalid = "raise") -> None:
        """Have the flags of a call looked at, once they are there; at once if they lie on the CPU.

        Nothing is done where nobody may look, now or later: in compiled and traced code, in a CUDA graph
        that somebody records. There the flags in the result have to do.

        Args:
            sound: for each image, ``[B]`` bool, or int64 below zero for those that are not finite.
            message: says what is not finite.
            on_invalid: ``"raise"`` or ``"grid"``.

        Raises:
            ValueError: an image is not finite, the flags are on the CPU, and it is to be raised.
        """
        if torch.compiler.is_compiling():
            return
        sound = values(sound.detach())
        if is_traced(sound):
            return
        if on_host(sound):
            self._tell([_Found(_wrong(sound), sound.numel(), message, on_invalid)])
        elif sound.device.type == _line.device_type and sound.numel():
            with _line.around(sound.device), torch.inference_mode(False), torch.no_grad():
                if not _line.recorded():
                    self._send(sound.reshape(-1), message, on_invalid)

    def look(self) -> None:
        """Read the flags that have arrived; not inside a recording, which a look at events would break off.

        Raises:
            ValueError: an image was not finite, and that is to be raised; names it.
        """
        if self._pending and not _line.recorded():
            self._read(wait=False)

    def check(self) -> None:
        """The same after waiting for all calls so far."""
        self._read(wait=True)

    def _caller(self) -> tuple[int, int]:
        """This thread, and how many calls it has begun."""
        return threading.get_ident(), getattr(self._local, "calls", 0)

    def _send(self, sound: torch.Tensor, message: str, on_invalid: OnInvalid) -> None:
        images = sound.numel()
        with self._lock:
            place = self._place(images, sound.dtype)
        place.flags[:images].copy_(sound, non_blocking=True)
        place.arrived.record()
        note = _Note(place, images, message, on_invalid, self._caller())
        with self._lock:
            self._pending.append(note)
            while len(self._pending) > MOST_PENDING:
                self._pending.popleft()  # with its memory, into which the device may yet write

    def _place(self, images: int, dtype: torch.dtype) -> _Place:
        for index, place in enumerate(self._free):
            if place.flags.dtype == dtype and place.flags.numel() >= images:
                return self._free.pop(index)
        size = max(_LEAST_IMAGES, 1 << (images - 1).bit_length())
        return _Place(_line.pinned(size, dtype), _line.event())

    def _read(self, *, wait: bool) -> None:
        if torch.compiler.is_compiling():
            return
        if wait:
            for note in list(self._pending):
                note.place.arrived.synchronize()
        with self._lock:
            arrived: list[_Note] = []
            rest: deque[_Note] = deque()
            for note in self._pending:  # of several streams, in any order
                (arrived if note.place.arrived.query() else rest).append(note)
            self._pending = rest
            found = [(note, _wrong(note.place.flags[: note.images])) for note in arrived]
            self._free += [note.place for note in arrived]
            del self._free[:-MOST_PENDING]
        here = self._caller()
        self._tell(
            [
                _Found(
                    images,
                    note.images,
                    note.message,
                    note.on_invalid,
                    "in this call, " if note.caller == here else "in an earlier call, ",
                )
                for note, images in found
            ]
        )

    def _tell(self, found: Sequence[_Found]) -> None:
        """Raise or warn for images that were not finite."""
        bad = [one for one in found if one.images]
        for one in bad:
            if one.on_invalid == "grid" and not self._warned:
                self._warned = True
                _log.warning(
                    "%s: tokens spread evenly are kept. %s. This is said once", one.where(), one.message
                )
        errors = [f"{one.where()}: {one.message}" for one in bad if one.on_invalid == "raise"]
        if errors:
            raise ValueError("; ".join(dict.fromkeys(errors)))


_watched: ContextVar[Watch | None] = ContextVar("watched", default=None)
_of_functions = threading.local()


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Let what is called inside note its flags here."""
    before = _watched.set(watch)
    try:
        yield
    finally:
        _watched.reset(before)


def watched() -> Watch | None:
    """Whose call this is, if somebody's."""
    return None if torch.compiler.is_compiling() else _watched.get()


def watch_of_functions() -> Watch:
    """:func:`watched`, or for functions that are called by nobody of ours, one for this thread: a call of
    them begins.

    Raises:
        ValueError: an earlier one's tensors were not finite.
    """
    watch = watched()
    if watch is not None:
        return watch
    if not hasattr(_of_functions, "watch"):
        _of_functions.watch = Watch()
    made: Watch = _of_functions.watch
    made.start()
    return made


def _wrong(sound: torch.Tensor) -> list[int]:
    """Numbers of the images whose flag is false or below zero."""
    flags = sound.reshape(-1)
    bad = flags < 0 if flags.dtype != torch.bool else ~flags
    return bad.nonzero()[:, 0].tolist()
