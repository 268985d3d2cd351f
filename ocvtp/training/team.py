"""The processes that train together, as Hugging Face ``accelerate`` started them; often one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to do."""


class Team:
    """This process among those that ``accelerate launch`` started.

    Args:
        device: to compute on; ``None``: what accelerate chooses. Several processes on GPUs have one each.

    Attributes:
        rank: this process's number, from 0.
        size: processes.
        device: this process's.

    Raises:
        ValueError: accelerate is not installed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ValueError("training needs accelerate: pip install 'ocvtp[train]'") from error
        # Not accelerate's Accelerator: its precision is one of the whole process's life, and it wants a GPU
        # for float16.
        state = PartialState(cpu=device is not None and device.type == "cpu")
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.device: torch.device = state.device if device is None or self.size > 1 else device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, size: int) -> tuple[int, int]:
        """This process's share of ``size`` things in a row, the last one excluded."""
        return size * self.rank // self.size, size * (self.rank + 1) // self.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module``, whose gradients will be means over all processes."""
        if self.size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become means over all processes, where they are not taken in :meth:`wrap`'s backward."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, added up over all processes, in float64 on the CPU. All must call it."""
        values = values.to("cpu", torch.float64)
        if self.size > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values.cpu()

    def together(self, call: Callable[[], Result]) -> Result:
        """What ``call`` returns; if it raises in one process, all of them raise, and none waits forever.

        Raises:
            TrainingError: it raised elsewhere.
        """
        if self.size == 1:
            return call()
        failure: Exception | None = None
        try:
            result = call()
        except Exception as error:
            failure = error
        failed = self.sum(torch.tensor([float(failure is not None)]))
        if failure is not None:
            raise failure
        if failed.item():
            raise TrainingError("another process failed and says why; all have stopped")
        return result
