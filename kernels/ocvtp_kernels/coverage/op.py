"""Coverage for PyTorch: operator schema, fake, FLOPs. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._library import define, map_images

__all__ = ["coverage"]


def _launch(x: torch.Tensor, indices: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.coverage import triton as kernels

    return kernels.coverage(x, indices, rounds)


def _fake(x: torch.Tensor, indices: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(indices, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[0], dtype=torch.float32
    )


def _flops(x: Any, indices: Any, rounds: int, **_: Any) -> int:
    """Products: nearest kept tokens, at the start and in every round, and each round's means."""
    batch, tokens, width = x
    return int(2 * batch * tokens * indices[1] * width * (1 + 2 * rounds))


_coverage = define(
    "coverage(Tensor x, Tensor indices, SymInt rounds) -> (Tensor, Tensor)", _launch, _fake, _flops
)

map_images(_coverage)


def coverage(x: torch.Tensor, indices: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Refined kept tokens ``[B, T]``, in no order, and their coverage error ``[B]`` float32."""
    refined, error = _coverage(x, indices, rounds)
    return refined, error
