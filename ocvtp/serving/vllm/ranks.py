"""One choice on all ranks that share a tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ocvtp.selection import Selection
from ocvtp.vlm.contracts.selector import Begun, Choice, Group, Selector, Started
from ocvtp_kernels.selection import gather_tokens


@dataclass(frozen=True)
class OnAllRanks:
    """A selector whose choice is that of rank 0.

    Ranks compute the same; were one to differ by a rounding, each would go on with other tokens, and answers
    would be garbage.
    """

    selector: Selector

    @property
    def name(self) -> str:
        """See :class:`~ocvtp.vlm.contracts.selector.Selector`."""
        return self.selector.name

    @property
    def read_layer(self) -> int | None:
        """See :class:`~ocvtp.vlm.contracts.selector.Selector`."""
        return self.selector.read_layer

    @property
    def reads_scores(self) -> bool:
        """See :class:`~ocvtp.vlm.contracts.selector.Selector`."""
        return self.selector.reads_scores

    def begin(
        self,
        group: Group,
        features: torch.Tensor | None,
        device: torch.device,
        *,
        return_attention: bool = False,
    ) -> Begun:
        """See :class:`~ocvtp.vlm.contracts.selector.Selector`."""
        return _Begun(self.selector.begin(group, features, device, return_attention=return_attention))

    def beside(self, work: Callable[[], torch.Tensor], reads: Sequence[torch.Tensor]) -> Started | None:
        """See :class:`~ocvtp.vlm.contracts.selector.Selector`."""
        return self.selector.beside(work, reads)

    def close(self) -> None:
        """See :class:`~ocvtp.vlm.contracts.selector.Selector`."""
        self.selector.close()


@dataclass(frozen=True)
class _Begun:
    begun: Begun

    def get(self) -> _Choice:
        return _Choice(self.begun.get())


@dataclass(frozen=True)
class _Choice:
    choice: Choice

    def select(self, fill_scores: torch.Tensor | None) -> Selection:
        selection = self.choice.select(fill_scores)
        return replace(selection, indices=_of_first_rank(selection.indices))

    def select_rows(
        self, fill_scores: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[Selection, torch.Tensor]:
        selection = self.select(fill_scores)
        return selection, gather_tokens(x, selection.indices.to(x.device))


def _of_first_rank(indices: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return indices
    same: torch.Tensor = group.broadcast(indices.contiguous(), src=0)
    return same
