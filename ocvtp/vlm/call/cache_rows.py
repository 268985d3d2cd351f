"""Which row of a cache is which, found by what the rows hold.

Caches are reordered, repeated and cut by a dozen methods, of their layers as well; they are copied and saved.
Whatever was done, a row takes its keys along.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CachedRows:
    """What the rows of a cache held when somebody looked.

    Attributes:
        layer: that was looked at: the first that holds every token as it came, else one that holds the last.
        keys: ``[R, tokens, D]`` of its first head, copied.
        seen: the tensor they are from.
    """

    layer: int
    keys: torch.Tensor
    seen: _Seen

    @classmethod
    def of(cls, cache: Any, tokens: int) -> CachedRows | None:
        """The rows of a cache of so many tokens; ``None`` if it holds no key as it came (quantised, say)."""
        best = None
        for number, layer in enumerate(getattr(cache, "layers", ())):
            keys = _keys(layer)
            if keys is None or keys.is_meta:
                continue
            if best is None or keys.shape[-2] >= tokens:
                best = number, keys
            if keys.shape[-2] >= tokens:
                break
        return None if best is None else cls(best[0], best[1].detach()[:, 0, :tokens].clone(), _Seen(best[1]))

    def found_in(self, cache: Any, tokens: int) -> torch.Tensor | None:
        """Which of these rows each row of ``cache`` is: ``[rows]``; ``None`` if they are where they were.

        Waits for the device, unless the tensor is the very one that was looked at.

        Args:
            cache: the same one or a copy, changed or not.
            tokens: that it holds now, not more than before.

        Raises:
            ValueError: a row is none of these.
        """
        layers = getattr(cache, "layers", ())
        keys = _keys(layers[self.layer]) if self.layer < len(layers) else None
        if keys is None or self.seen.still(keys):
            return None
        now = keys.detach()[:, 0, :tokens]
        before = self.keys[:, :tokens].to(now.device)
        if now.shape[1:] != before.shape[1:]:  # a window that was cropped shows other tokens
            return None
        if now.shape == before.shape and bool((now == before).all()):
            return None
        found = torch.full((now.shape[0],), -1, device=now.device)
        for number in reversed(range(len(before))):
            found = torch.where((now == before[number]).flatten(1).all(1), number, found)
        unknown = (found < 0).nonzero()[:, 0].tolist()
        if unknown:
            raise ValueError(
                f"row {unknown[0]} of this cache holds something else than any row did when a pruned call "
                "filled it; continue with the cache as generate returned it, its rows in any order, or "
                "start with an empty one"
            )
        return found


def cached_batch(cache: Any) -> int | None:
    """Rows of a cache; ``None`` if it doesn't say."""
    for layer in getattr(cache, "layers", ()):
        keys = _keys(layer)
        if keys is not None:
            return int(keys.shape[0])
    return None


def _keys(layer: Any) -> torch.Tensor | None:
    """Keys ``[R, heads, tokens, D]`` of a layer, if it has any."""
    keys = getattr(layer, "keys", None)
    return keys if isinstance(keys, torch.Tensor) and keys.ndim == 4 else None


class _Seen:
    """A tensor as it was. A copy of this knows none: that of the tensor is another one."""

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        # Those of inference don't count what is written to them, and nobody counts while tracing.
        if torch.compiler.is_compiling() or (tensor is not None and tensor.is_inference()):
            tensor = None
        self._tensor = None if tensor is None else weakref.ref(tensor)
        self._version = 0 if tensor is None else tensor._version

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the one, and nobody has written to it since."""
        if self._tensor is None or torch.compiler.is_compiling() or self._tensor() is not tensor:
            return False
        return bool(tensor._version == self._version)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seen:
        return _Seen()

    def __reduce__(self) -> Any:
        return _Seen, ()
