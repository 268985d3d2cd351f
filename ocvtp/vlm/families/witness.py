"""What a CLIP or SigLIP tower's run can tell of some of its pictures, to methods that are not ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ocvtp.vlm.contracts.evidence import Merged, OneHead
from ocvtp.vlm.contracts.picking import some_of
from ocvtp.vlm.towers.clip import LayerInput, TowerRun, root
from ocvtp.vlm.towers.tome import run_merging_tower


@dataclass(frozen=True, eq=False)  # tensors have no truth
class Witness:
    """Some pictures of a call (:class:`~ocvtp.vlm.contracts.evidence.Evidence`).

    Attributes:
        tower: ``CLIPVisionModel`` or ``SiglipVisionModel``.
        done: its run, asked for when something of it is wanted: a tower that merges has none.
        pixels: ``[all pictures, 3, H, W]``.
        projects: ``[all pictures, N, D]`` of all candidates.
        pictures: numbers of those that are asked about.
        tiles: how many make a segment.
        grids: see the protocol.
        tokens: likewise.
        shape: likewise.
        class_token: likewise.
        prefix: tokens before the first candidate.
        consumed: the layer that the projector reads.
        backend: of fused operations.
    """

    tower: Any
    done: Callable[[], TowerRun]
    pixels: torch.Tensor
    projects: Callable[[], torch.Tensor]
    pictures: tuple[int, ...]
    tiles: int
    grids: Sequence[tuple[int, int]]
    tokens: int
    shape: tuple[int, int] | None
    class_token: bool
    prefix: int
    consumed: int
    backend: str
    _known: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def features(self) -> torch.Tensor:
        """See the protocol."""
        start = 0 if self.class_token else self.prefix
        return self._of(self.done().outputs[self.consumed])[:, start:]

    def salience(self) -> torch.Tensor:
        """See the protocol."""
        if not self.class_token:
            return self.received(self.consumed)
        query, key = self._first_query_and_keys()
        with torch.no_grad():
            return self._input(self.consumed).attention(query, key, self.backend)[:, self.prefix :]

    def received(self, block: int) -> torch.Tensor:
        """See the protocol."""
        with torch.no_grad():
            return self._input(block).received_attention(self.backend)[:, self.prefix :]

    def keys(self) -> torch.Tensor:
        """See the protocol."""
        _, key = self._first_query_and_keys()
        heads = self._input(self.consumed).heads_of(key)
        wide = torch.promote_types(key.dtype, torch.float32)
        return heads.detach().to(wide).mean(1)[:, 0 if self.class_token else self.prefix :]

    def one_head(self) -> OneHead:
        """See the protocol."""
        layers = root(self.tower).encoder.layers
        if self.consumed + 1 < len(layers):
            deeper = LayerInput(layers[self.consumed + 1], self._of(self.done().outputs[self.consumed]))
        else:
            deeper = self._input(self.consumed)
        with torch.no_grad():
            query, key = deeper.query_key(queries=1 if self.class_token else None)
            wide = torch.promote_types(key.dtype, torch.float32)
            logits = (query.to(wide) @ key.to(wide).transpose(1, 2)) * key.shape[2] ** -0.5
            row = logits.softmax(-1).mean(1)
        return OneHead(row[:, self.prefix :], key[:, self.prefix :])

    def projected(self) -> torch.Tensor:
        """See the protocol."""
        return self._of(self.projects())

    def merged(self, removed: Sequence[int]) -> Merged:
        """See the protocol."""
        return run_merging_tower(self.tower, self._of(self.pixels), removed)

    def _first_query_and_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the consumed block, for :meth:`salience` and :meth:`keys` together."""
        if not self._known:
            with torch.no_grad():
                self._known.append(self._input(self.consumed).query_key(queries=1))
        return self._known[0]

    def _input(self, block: int) -> LayerInput:
        found = self.done().inputs.get(block)
        if found is None:
            raise ValueError(
                f"attention of encoder layer {block} is asked for, and this call runs layers up to "
                f"{self.consumed}: use another vision_feature_layer"
            )
        return found if len(self.pictures) == len(self.pixels) else found.of(self.pictures)

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        return some_of(tensor, self.pictures)
