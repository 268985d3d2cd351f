"""What a key-value cache holds, for conversations that go on with it.

After a pruned call, a cache is shorter than the conversation the user has in hand. transformers slices the
next turn's ``input_ids`` by the cache's length, so without a note it would feed image placeholders again and
answer from a scrambled prompt without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ocvtp.vlm.call.prompt import identity

_ATTRIBUTE = "_ocvtp_note"


@dataclass(frozen=True)
class CacheNote:
    """Relation of a cache to the long sequence.

    Attributes:
        index: ``[B, C]`` long column behind every cached one, -1 for padding.
        long: columns of the long sequence so far.
        next_position: ``[B, 1]`` position of the next token; ``None`` where ``generate`` filled the cache,
            which numbers tokens by counting the attention mask.
        pruned: whether the two sequences differ at all.
        foreign: whether the cache was filled without the patch, so that positions in it are a guess.
        live: ``[B, 1]`` cached columns that were not masked when ``next_position`` was known; ``None`` where
            nobody needs to know.
        packed: whether rows hold several documents that don't see each other.
    """

    index: torch.Tensor
    long: int
    next_position: torch.Tensor | None
    pruned: bool = True
    foreign: bool = False
    live: torch.Tensor | None = None
    packed: bool = False

    def cropped(self, length: int) -> CacheNote:
        """The note of a cache cropped to its first ``length`` columns.

        Raises:
            ValueError: the cache grew, or lost more than the text at its end.
        """
        lost = self.index.shape[1] - length
        if lost == 0:
            return self
        if lost < 0 or not self._ends_in_text(lost):
            raise ValueError(
                f"pruned prompts filled this cache with {self.index.shape[1]} tokens and it now holds "
                f"{length}, perhaps from a call that failed; crop it to what it held, continue with the "
                "cache as generate returned it, or start with an empty one"
            )
        return replace(self.moved(-lost), index=self.index[:, :length])

    def moved(self, by: int) -> CacheNote:
        """With ``by`` more columns of text at the end, but for the index."""
        return replace(self._counts(lambda count: count + by), long=self.long + by)

    def repeated(self, copies: int) -> CacheNote:
        """With every sequence ``copies`` times."""
        index = self.index.repeat_interleave(copies, 0)
        return replace(self._counts(lambda count: count.repeat_interleave(copies, 0)), index=index)

    def _counts(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CacheNote:
        """With what counts tokens changed, as far as it is known."""
        position, live = (None if each is None else change(each) for each in (self.next_position, self.live))
        return replace(self, next_position=position, live=live)

    def _ends_in_text(self, columns: int) -> bool:
        """Whether the last columns followed one another in the long sequence."""
        tail = torch.arange(self.long - columns, self.long, device=self.index.device)
        return bool((self.index[:, self.index.shape[1] - columns :] == tail).all())

    def to(self, device: torch.device) -> CacheNote:
        """The note on another device."""
        return replace(self._counts(lambda count: count.to(device)), index=self.index.to(device))


def cached_length(cache: Any) -> int:
    """Tokens in a cache; 0 for none."""
    return 0 if cache is None else int(cache.get_seq_length())


def note_of(cache: Any) -> CacheNote | None:
    """The note on a cache, or ``None``. A cache that was emptied loses its note."""
    note = getattr(cache, _ATTRIBUTE, None)
    if note is not None and not cached_length(cache):
        write_note(cache, None)
        return None
    return note


def write_note(cache: Any, note: CacheNote | None) -> None:
    """Put a note on a cache, or take it off."""
    if note is not None:
        setattr(cache, _ATTRIBUTE, note)
    elif hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def prefix_of(cache: Any, batch: int, device: torch.device, *, generating: bool) -> CacheNote | None:
    """What ``cache`` holds of a conversation of ``batch`` rows; ``None`` if nothing.

    Raises:
        ValueError: the cache belongs to another batch, or was changed beyond recognition.
    """
    length = cached_length(cache)
    if not length:
        return None
    note = note_of(cache)
    if note is None:
        # Filled without pruning, so by the same entry point the user continues with.
        start = None if generating else torch.full((batch, 1), length, device=device)
        return CacheNote(identity(batch, 0, length, device), length, start, pruned=False, foreign=True)
    if note.index.shape[0] != batch:
        raise ValueError(f"the cache holds {note.index.shape[0]} sequences, the prompt has {batch}")
    return note.cropped(length).to(device)
