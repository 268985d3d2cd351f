"""One process or several, which ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed


def own_device(name: str) -> torch.device:
    """The device of that name; of several processes on GPUs, each has its own."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and distributed.is_torchelastic_launched():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun tells no other way
        torch.cuda.set_device(device)
    return device


class Team:
    """The processes of a run, all of which hold the same weights.

    Attributes:
        number: of this one.
        size: how many.
    """

    def __init__(self, device: torch.device) -> None:
        self.number, self.size = 0, 1
        if distributed.is_available() and distributed.is_torchelastic_launched():
            if not distributed.is_initialized():
                distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.number, self.size = distributed.get_rank(), distributed.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.number == 0

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give all processes the mean of their gradients."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device=device)
        distributed.all_reduce(count)
        return bool(count)
