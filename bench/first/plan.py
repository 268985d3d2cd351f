"""The steps, most telling first."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: Tests that only vary tiles, or find little that others don't, cost kernels to compile and are left out.
LEFT_OUT = "not libraries and not thorough and not tiles"
_WORKERS = 8


@dataclass(frozen=True)
class Step:
    """Something to find out.

    Attributes:
        name: of the step.
        question: that it answers.
        decides: what depends on the answer.
        limit: seconds that it may take.
        least: seconds without which it isn't worth a start.
        tests: it runs, or
        check: of :data:`bench.first.checks.CHECKS`.
        environment: variables of its process.
    """

    name: str
    question: str
    decides: str
    limit: float
    least: float
    tests: tuple[str, ...] = ()
    check: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, device: str, tiny: bool) -> list[str]:
        """What to run."""
        if self.check:
            options = ["--device", device, *(["--tiny"] if tiny else [])]
            return [sys.executable, "-m", "bench.first.checks", self.check, *options]
        # A line for each test: what passed until time ran out is known.
        options = [*_in_parallel(self.tests), "-m", LEFT_OUT, "-vv", "-rfE", "--tb=short"]
        return [sys.executable, "-m", "pytest", *self.tests, *options]


def _in_parallel(tests: Sequence[str]) -> list[str]:
    """Compiling takes processors, not the GPU. Workers find on disk what another one has compiled, so that
    they may share the tests of one file."""
    if len(tests) < 2 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(_WORKERS), "--dist", "worksteal"]


STEPS: tuple[Step, ...] = (
    Step(
        "capture",
        "do graphs of the slots replay what eager calls compute?",
        "whether overlap and graphs may stay on by default",
        limit=70,
        least=20,
        tests=("tests/pruner/test_capture.py", "tests/pruner/test_lane.py"),
    ),
    Step(
        "stream",
        "does a capture that fails leave the thread on its own stream?",
        "whether a failed capture can corrupt what others compute",
        limit=40,
        least=12,
        check="stream",
        environment={"CUDA_LAUNCH_BLOCKING": "1"},
    ),
    Step(
        "right",
        "are slots, selection and received attention right?",
        "everything else",
        limit=170,
        least=60,
        tests=(
            "tests/kernels/test_slot_loop.py",
            "tests/kernels/test_slot_attention_triton.py",
            "tests/kernels/test_selection_triton.py",
            "tests/kernels/test_received_attention_triton.py",
        ),
    ),
    Step(
        "bits",
        "same bits whatever the tile, the way the loop is launched, and the batch?",
        "whether tiles may depend on the number of rows",
        limit=80,
        least=20,
        check="bits",
    ),
    Step(
        "graphs",
        "what does a node of a graph cost: plain, as a dependent launch, as a phase of one launch?",
        "dependent launches or one launch for the loop",
        limit=40,
        least=15,
        check="graphs",
    ),
    Step(
        "traffic",
        "how much does L2 give a multiprocessor?",
        "tiles of large batches",
        limit=50,
        least=20,
        check="traffic",
    ),
    Step(
        "launches",
        "what does each launch of the slots take, beside what was predicted?",
        "whether linears are bound by instructions, and how far the model can be trusted",
        limit=90,
        least=30,
        check="launches",
    ),
    Step(
        "waiting",
        "does the vision side wait for the GPU, with images of two sizes?",
        "whether index tensors have to be pinned",
        limit=45,
        least=15,
        check="waiting",
    ),
    Step(
        "vision",
        "what does the vision side take at B=1, eager and as one graph?",
        "whether the whole vision side is worth a graph",
        limit=60,
        least=20,
        check="vision",
    ),
)
