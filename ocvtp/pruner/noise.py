"""Seeded slot noise: the same seed gives the same noise on every device and for every image."""

from __future__ import annotations

import torch


@torch.library.custom_op("ocvtp::seeded_normal", mutates_args=())
def seeded_normal(rows: int, width: int, seed: int) -> torch.Tensor:
    """Standard-normal ``[rows, width]`` float32 on the CPU, from a generator of its own.

    An operator of its own because ``torch.compile`` can't trace a generator, and drawn on the CPU because
    generators of different devices disagree.
    """
    # Explicit, because a process may have set another default device or dtype.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(rows, width, generator=generator, device="cpu", dtype=torch.float32)


@seeded_normal.register_fake
def _(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.empty(rows, width, device="cpu", dtype=torch.float32)
