"""One call, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from bench.guard.watch import Allocation, Functions, HostSyncError, Watch
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import recording

#: Rows of the tile table that are counted with: they decide how much memory some launchers take.
ARCH = "sm90"
#: What our own code decides. The rest of a row changes with PyTorch's version, too.
OURS = ("launches", "flops")


@dataclass(frozen=True)
class Counts:
    """What one call does.

    Attributes:
        launches: kernel of ours -> how many times it is launched.
        flops: operator of ours -> floating-point operations, by its registered formula.
        torch_flops: of PyTorch's operators.
        operators: of PyTorch's that compute something.
        allocated: memory, in order.
        waits: operator -> how often it made the host wait for the device. On meta tensors the first one ends
            the call.
    """

    launches: dict[str, int]
    flops: dict[str, int]
    torch_flops: int
    operators: int
    allocated: tuple[Allocation, ...]
    waits: dict[str, int]

    def row(self) -> dict[str, Any]:
        """What the snapshot holds of it; sizes are bytes."""
        sizes = [one.nbytes for one in self.allocated]
        return {
            "launches": self.launches,
            "flops": self.flops,
            "torch_flops": self.torch_flops,
            "operators": self.operators,
            "allocations": len(sizes),
            "allocated": sum(sizes),
            "largest": max(sizes, default=0),
            "waits": self.waits,
        }


def count(call: Callable[[], object], arch: str = ARCH) -> Counts:
    """Count what the second ``call`` does with tensors on ``meta``, as on a GPU of ``arch``; no kernel runs.

    Gradients are counted if ``call`` asks for them: on ``meta`` they are computed in the calling thread.
    """
    with pretend(arch):
        _counted(call)  # what it keeps for later calls
        return _counted(call)


def _counted(call: Callable[[], object]) -> Counts:
    with recording() as launches, Watch() as watch, FlopCounterMode(display=False) as flops:
        try:
            with Functions(watch.waits):
                call()
        except HostSyncError:
            assert watch.waits
    by_operator = {str(packet): n for packet, n in flops.get_flop_counts().get("Global", {}).items()}
    ours = {name.partition(".")[2]: n for name, n in by_operator.items() if name.startswith("ocvtp_kernels.")}
    return Counts(
        launches=dict(sorted(Counter(launch.kernel.fn.__name__ for launch in launches).items())),
        flops=dict(sorted(ours.items())),
        torch_flops=sum(by_operator.values()) - sum(ours.values()),
        operators=watch.operators,
        allocated=tuple(watch.allocated),
        waits=dict(sorted(watch.waits.items())),
    )
