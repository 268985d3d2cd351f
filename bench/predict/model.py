"""From counts to microseconds on an H100. A model: nothing here was measured.

A launch takes what it takes to start, and then the longest of what its busiest multiprocessor is given to do:
issue instructions, multiply on tensor cores, move bytes to and from L2; or, where it touches more than L2
holds, what memory takes. Nothing overlaps with another launch, and within one everything does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.predict import hopper
from bench.predict.kernel import Counts
from bench.predict.steps import Operator


@dataclass(frozen=True)
class Times:
    """Microseconds of one launch.

    Attributes:
        name: of the kernel, or of the operator.
        start: until its first program runs, after the launch in front of it.
        issue: to issue its instructions; ``tensor`` for its products, ``dram`` for bytes that L2 can't hold.
        l2: for its bytes, at each of :data:`hopper.L2_RATES`.
        waits: between phases inside of it.
        phases: of a launch whose programs wait for each other, each phase.
    """

    name: str
    start: float
    issue: float
    tensor: float
    l2: tuple[float, ...]
    dram: float
    waits: float = 0.0
    phases: tuple[Times, ...] = ()
    counts: Counts | None = field(default=None, compare=False)

    def work(self, rate: int) -> float:
        """Without its start, at one of the rates of L2."""
        if self.phases:
            return self.waits + sum(phase.work(rate) for phase in self.phases)
        return max(self.issue, self.tensor, self.l2[rate], self.dram)

    def total(self, rate: int) -> float:
        """With its start."""
        return self.start + self.work(rate)

    def bound(self, rate: int) -> str:
        """What takes longest."""
        if self.phases:
            return "phases"
        parts = {"issue": self.issue, "tensor": self.tensor, "L2": self.l2[rate], "DRAM": self.dram}
        name = max(parts, key=lambda part: parts[part])
        return name if parts[name] > self.start else "launch"


def issue_rate(warps: float) -> float:
    """Instructions a clock of a scheduler that has so many warps to choose from."""
    return next(rate for least, rate in hopper.ISSUE if warps >= least)


def start(images: int, dependent: bool) -> float:
    """Of one launch among others in a CUDA graph."""
    plain = hopper.START if images <= hopper.FEW_IMAGES else hopper.START_LARGE
    return min(plain, hopper.START_DEPENDENT) if dependent else plain


def kernel(counts: Counts, images: int) -> Times:
    """Of one launch of ours."""
    each = math.ceil(counts.programs / hopper.PROCESSORS)  # programs of the busiest multiprocessor
    resident = min(counts.resident, each)
    warps = max(1, resident * counts.warps // hopper.SCHEDULERS)
    instructions = counts.executed * counts.warps * each
    products = counts.half + (counts.multiply_adds - counts.half) / hopper.TF32
    share = each / counts.programs
    return Times(
        name=counts.kernel,
        start=start(images, counts.dependent),
        issue=instructions / (hopper.SCHEDULERS * issue_rate(warps) * hopper.CLOCK),
        tensor=products * share / (hopper.MULTIPLY_ADDS * hopper.TENSOR_SHARE * hopper.CLOCK),
        l2=tuple(counts.l2 * share / rate for rate in hopper.L2_RATES),
        dram=counts.dram / hopper.DRAM if counts.dram > hopper.L2 else 0.0,
        counts=counts,
    )


def phased(whole: Counts, phases: Mapping[str, Counts], images: int) -> Times:
    """Of a launch whose programs do the tasks of phases that wait for each other.

    Args:
        whole: all of it.
        phases: in their order, what the tasks of each do together.
        images: in the call.
    """
    parts = [kernel(counts, images) for counts in phases.values()]
    named = [Times(name, 0.0, *_rest(part)) for name, part in zip(phases, parts, strict=True)]
    base = kernel(whole, images)
    return Times(
        name=whole.kernel,
        start=base.start,
        issue=sum(part.issue for part in parts),
        tensor=sum(part.tensor for part in parts),
        l2=tuple(sum(part.l2[rate] for part in parts) for rate in range(len(hopper.L2_RATES))),
        dram=base.dram,
        waits=len(parts) * hopper.PHASE,
        phases=tuple(named),
        counts=whole,
    )


def _rest(part: Times) -> tuple[float, float, tuple[float, ...], float]:
    return part.issue, part.tensor, part.l2, part.dram


def operator(one: Operator, images: int) -> Times:
    """Of an operator of PyTorch: bytes over all of L2's, or memory's, rate; products in tiles of a GEMM."""
    tiles = math.ceil(one.outputs / hopper.GEMM_TILE)
    busy = tiles / (math.ceil(tiles / hopper.PROCESSORS) * hopper.PROCESSORS) if tiles else 1.0
    return Times(
        name=one.name,
        start=start(images, False),
        issue=0.0,
        tensor=one.flops / (hopper.GEMM * busy),
        l2=tuple(one.nbytes / (rate * hopper.PROCESSORS) for rate in hopper.L2_RATES),
        dram=one.nbytes / hopper.DRAM if one.nbytes > hopper.L2 else 0.0,
    )


def total(parts: Sequence[Times], rate: int) -> float:
    """One after another."""
    return sum(part.total(rate) for part in parts)
