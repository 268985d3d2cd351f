"""What is measured: a case (an operation at a shape), and its candidates (implementations of it)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import pytest
import torch

from bench.micro.ceilings import Work
from bench.micro.gates import Outputs
from bench.micro.timing import Mode
from ocvtp_kernels._arch import interpreting, why_no_kernels

Inputs = TypeVar("Inputs")
Expected = TypeVar("Expected")
Function = Callable[[Any], Outputs]
Gate = Mapping[str, object]


@cache
def bench_device() -> torch.device:
    """The GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class Case(ABC, Generic[Inputs, Expected]):
    """One operation at one shape.

    Attributes:
        name: of the shape, say the model that has it.
        batch: images.
        dtype: of the 16-bit tensors; float32 on a CPU.
    """

    name: str
    batch: int
    dtype: torch.dtype

    #: What is done, and which results file it goes to.
    op = ""
    family = ""

    @property
    def label(self) -> str:
        """For test ids and tables."""
        return f"{self.name}-B{self.batch}-{str(self.dtype).removeprefix('torch.')}"

    @abstractmethod
    def shape(self) -> dict[str, int]:
        """Sizes by letter."""

    @abstractmethod
    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""

    @abstractmethod
    def work(self, candidate: str) -> Work:
        """The least that ``candidate`` has to do."""

    @abstractmethod
    def draw(self, seed: int, device: torch.device) -> Inputs:
        """Random inputs."""

    @abstractmethod
    def expect(self, inputs: Inputs) -> Expected:
        """What the gate compares with; computed before anything is timed."""

    @abstractmethod
    def check(self, candidate: str, got: Outputs, expected: Expected) -> Gate:
        """What was found, for the record.

        Raises:
            GateError: ``candidate`` computes something else.
        """


def anywhere(case: Any, device: torch.device) -> str | None:
    """Nothing keeps it from running."""
    return None


def where_kernels_run(case: Any, device: torch.device) -> str | None:
    """Why our kernels can't be timed."""
    if device.type != "cuda":
        return "no GPU: interpreted kernels tell nothing about speed"
    return "TRITON_INTERPRET is set" if interpreting() else why_no_kernels(device)


@dataclass(frozen=True)
class Candidate:
    """One implementation.

    Attributes:
        name: in tables; ours start with "ours".
        make: case -> function of the case's inputs.
        modes: ways to time it on a GPU; what waits for the host can't be captured in a graph.
        why_not: (case, device) -> why it can't run there, or ``None``.
        compiled: by ``torch.compile``: measured last, and skipped where that fails.
        note: what a reader of its row must know.
    """

    name: str
    make: Callable[[Any], Function]
    modes: Sequence[Mode] = ("graph", "eager")
    why_not: Callable[[Any, torch.device], str | None] = anywhere
    compiled: bool = False
    note: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is what this package offers, with nothing to fall back on."""
        return self.name.startswith("ours")


def compiled(function: Callable[..., Outputs], mode: str | None = None) -> Callable[..., Outputs]:
    """``torch.compile`` of a baseline, specialised on its shapes; a graph break is an error."""
    torch._dynamo.reset()  # else a ninth shape would be refused
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def rows(cases: Sequence[Case[Any, Any]]) -> list[Any]:
    """Parameters ``case, candidate, mode`` of a test: what compiles comes last, in case time runs out."""
    return list(_rows(cases))


def _rows(cases: Sequence[Case[Any, Any]]) -> Iterator[Any]:
    for last in (False, True):
        for case in cases:
            for candidate in case.candidates():
                if candidate.compiled == last:
                    for mode in candidate.modes if bench_device().type == "cuda" else ("eager",):
                        name = f"{case.op}-{case.label}-{candidate.name}-{mode}".replace(" ", "-")
                        yield pytest.param(case, candidate, mode, id=name)
