"""Tests of kernels and pruner, with PyTorch's libraries set as other machines have them.

What Triton's interpreter runs is left out: it is slow, and its products are NumPy's whatever is set here. So
is what compiles or exports: it is slow, too, and its products are those of the rest. Broken files hold none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: At the top of every test file that runs kernels.
INTERPRETED = '\npytest.importorskip("triton")\n'
#: Of such files, what rests on PyTorch's products.
AND = ["tests/kernels/test_slot_attention_triton.py::test_start_of_any_slots"]

#: Parts of names of tests and files.
LEFT_OUT = ("triton", "compile", "captured", "fake_tensors", "one_graph", "odd_files")

# Without effect where a library does not know them.
NONE = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def files() -> list[str]:
    found = [path for folder in ("kernels", "pruner") for path in ROOT.glob(f"tests/{folder}/test_*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in found if INTERPRETED not in path.read_text())


def run(environment: dict[str, str], *options: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--tb=short", "--durations=0", "--durations-min=5"),
            *("-k", f"any_slots or not ({' or '.join(LEFT_OUT)})", *options, *files(), *AND),
        ],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_which_files_run() -> None:
    names = {Path(name).name for name in files()}
    assert {
        "test_slot_attention.py",
        "test_received_attention.py",
        "test_pruner.py",
        "test_refine.py",
    } <= names
    assert not any("triton" in name for name in names)


@pytest.mark.slow
def test_without_vector_instructions() -> None:
    run(NONE, "--threads=1")


@pytest.mark.libraries
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instructions", ["all", "avx2", "none"])
def test_instructions_and_threads(instructions: str, threads: int) -> None:
    run({"all": {}, "avx2": AVX2, "none": NONE}[instructions], f"--threads={threads}")


@pytest.mark.libraries
@pytest.mark.parametrize("threads", [1, 2])
def test_without_onednn(threads: int) -> None:
    run({}, "--without-onednn", f"--threads={threads}")
