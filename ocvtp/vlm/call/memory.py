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

from ocvtp.vlm.call.cache_rows import CachedRows
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
        rows: what the cache held, row by row, when the note was put on it.
        bias: ``[B, C]`` float32, log of how many tokens each cached one stands for; ``None`` where all stand
            for themselves, or the language model was not told.
    """

    index: torch.Tensor
    long: int
    next_position: torch.Tensor | None
    pruned: bool = True
    foreign: bool = False
    live: torch.Tensor | None = None
    packed: bool = False
    rows: CachedRows | None = None
    bias: torch.Tensor | None = None

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
        bias = None if self.bias is None else self.bias[:, :length]
        return replace(self.moved(-lost), index=self.index[:, :length], bias=bias)

    def grown(self, rows: int, new: int) -> CacheNote:
        """After ``new`` more tokens of text in each of ``rows`` sequences."""
        note = self.repeated(rows // len(self.index))
        more = identity(rows, note.long, note.long + new, note.index.device)
        bias = None if note.bias is None else torch.nn.functional.pad(note.bias, (0, new))
        return replace(note.moved(new), index=torch.cat([note.index, more], dim=1), bias=bias)

    def moved(self, by: int) -> CacheNote:
        """With ``by`` more columns of text at the end, but for what has a value per column."""
        return replace(self._counts(lambda count: count + by), long=self.long + by)

    def repeated(self, copies: int) -> CacheNote:
        """With every sequence ``copies`` times."""
        rows = torch.arange(len(self.index), device=self.index.device)
        return self.of_rows(rows.repeat_interleave(copies))

    def of_rows(self, rows: torch.Tensor) -> CacheNote:
        """The note of the sequences ``rows``, ``[n]``."""
        moved = self._counts(lambda count: count[rows.to(count.device)])
        bias = None if self.bias is None else self.bias[rows.to(self.bias.device)]
        return replace(moved, index=self.index[rows.to(self.index.device)], bias=bias)

    def of_prompts(self, batch: int) -> CacheNote | None:
        """One row for each of ``batch`` prompts, whose rows follow each other; ``None`` if they differ."""
        first = torch.arange(0, len(self.index), len(self.index) // batch, device=self.index.device)
        shared = self.of_rows(first)
        again = shared.repeated(len(self.index) // batch)
        pairs = (
            (self.index, again.index),
            (self.next_position, again.next_position),
            (self.live, again.live),
            (self.bias, again.bias),
        )
        same = all(a is None or b is None or torch.equal(a, b) for a, b in pairs)
        return shared if same else None

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
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self._counts(lambda count: count.to(device)), index=self.index.to(device), bias=bias)


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
    """Put a note on a cache, or take it off. A new one remembers what the rows hold."""
    if note is not None:
        if note.rows is None:
            note = replace(note, rows=CachedRows.of(cache, cached_length(cache)))
        setattr(cache, _ATTRIBUTE, note)
    elif hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def prefix_of(cache: Any, batch: int, device: torch.device, *, copies: int | None = None) -> CacheNote | None:
    """What ``cache`` holds of a conversation of ``batch`` prompts; ``None`` if nothing.

    Args:
        cache: its rows may have been reordered, repeated or dropped since it was filled.
        batch: rows of ``input_ids``.
        device: of the result.
        copies: in ``generate``, how often it will repeat a prompt; ``None`` for ``forward``.

    Raises:
        ValueError: the cache belongs to another batch, or was changed beyond recognition.
    """
    length = cached_length(cache)
    if not length:
        return None
    note = note_of(cache)
    if note is None:
        # Filled without pruning, so by the same entry point the user continues with.
        start = torch.full((batch, 1), length, device=device) if copies is None else None
        return CacheNote(identity(batch, 0, length, device), length, start, pruned=False, foreign=True)
    note = note.cropped(length)
    found = None if note.rows is None else note.rows.found_in(cache, length)
    if found is not None:
        note = note.of_rows(found)
    held = note.index.shape[0]
    if held == batch:
        return note.to(device)
    if held != batch * (copies or 1):
        raise ValueError(f"the cache holds {held} sequences, the prompt has {batch}")
    shared = note.of_prompts(batch)
    if shared is None:
        raise ValueError(
            f"the cache holds {held} sequences for {batch} prompts, and those of a prompt differ: pass "
            "input_ids with a row for each"
        )
    return shared.to(device)
