"""Which shapes are worth a CUDA graph, and when one gives way to another. Counts calls, reads no clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

#: Calls that are remembered.
WINDOW = 64
#: Of these, how many must have been of a shape before it is captured.
SIGHTINGS = 3
# Calls without a capture after one that failed; twice as many after each further one, up to a limit.
_PAUSE = 32
_LONGEST_PAUSE = 4096
# The same after another thread's capture was in the way.
_SHORT_PAUSE = 4


class Admission(Generic[Key]):
    """Which keys have a place, of which there are few.

    A capture costs as much as several calls save by it. So a key comes in at its third sighting among the
    last 64 calls. Once all places are taken, it must have been seen there twice as often as the one that
    gives way: with more keys in turn than places, those that are in stay in. That happens once in 64 calls on
    average; as often as there are places, it may happen at once. Who went has to be seen three times anew.

    Args:
        places: how many there are.

    Attributes:
        calls: how many were noted.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._recent: deque[Key] = deque()
        self._count: Counter[Key] = Counter()
        self._inside: dict[Key, None] = {}
        self.calls = 0
        self._not_before = 0
        self._credit = places * WINDOW  # calls; a replacement takes WINDOW of them
        self._failures = 0

    def note(self, key: Key) -> None:
        """A call of this key."""
        self.calls += 1
        self._credit = min(self._credit + 1, self._places * WINDOW)
        self._recent.append(key)
        self._count[key] += 1
        if len(self._recent) > WINDOW:
            self._lower(self._recent.popleft())

    def due(self, key: Key) -> bool:
        """Whether to capture a key, which is not inside, now."""
        if self.calls < self._not_before or self._count[key] < SIGHTINGS:
            return False
        if len(self._inside) < self._places:
            return True
        return self._credit >= WINDOW and self._count[key] >= 2 * self._count[self._coldest()]

    def admit(self, key: Key) -> Key | None:
        """Take a key in that was captured; who gives way, if all places were taken."""
        self._failures = 0
        gone = None
        if len(self._inside) >= self._places:
            gone = self._coldest()
            self._credit -= WINDOW
            self.dismiss(gone)
        self._inside[key] = None
        return gone

    def dismiss(self, key: Key) -> None:
        """A key went; what was seen of it is forgotten."""
        self._inside.pop(key, None)
        self._recent = deque(other for other in self._recent if other != key)
        del self._count[key]

    def unseen(self) -> list[Key]:
        """Keys inside that are none of the last 64 calls."""
        return [key for key in self._inside if not self._count[key]]

    def failed(self) -> None:
        """A capture failed, for a reason that may pass: not again for a while."""
        pause = min(_PAUSE << self._failures, _LONGEST_PAUSE)
        self._failures = min(self._failures + 1, 16)
        self._not_before = self.calls + pause

    def busy(self) -> None:
        """Another capture was under way."""
        self._not_before = self.calls + _SHORT_PAUSE

    def _coldest(self) -> Key:
        """Of those inside, the one seen least; of several, the one that is in for longest."""
        return min(self._inside, key=lambda key: self._count[key])

    def _lower(self, key: Key) -> None:
        self._count[key] -= 1
        if not self._count[key]:
            del self._count[key]
