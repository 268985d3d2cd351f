"""The ahead-of-time compiler finds the faults it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.aot import waits_first

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")

COMPILE = """
import json, sys
from bench import aot
from bench.launches import launches
target, kernel, dtype, change = json.loads(sys.argv[1])
launch = next(
    launch
    for launch in launches(aot.TARGETS[target].tiles)
    if launch.kernel.fn.__name__ == kernel and dtype in str(launch.arguments[0].dtype)
)
usage = aot.compile_launch(launch._replace(tile={**launch.tile, **change}), target)
print(json.dumps([usage.registers, usage.spills, usage.shared, usage.matrix, usage.faults]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process where kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def compiled(target: str, kernel: str, dtype: str, **change: object) -> tuple[int, int, int, str, list[str]]:
    result = run("-c", COMPILE, json.dumps([target, kernel, dtype, change]))
    assert result.returncode == 0, result.stderr
    return tuple(json.loads(result.stdout))


def test_a_shipped_tile_has_no_fault() -> None:
    registers, spills, shared, matrix, faults = compiled("sm_90", "row_lse", "float16")
    assert 0 < registers <= 255
    assert spills == 0
    assert shared > 0
    assert matrix == "HGMMA"
    assert faults == []


def test_spills_are_found() -> None:
    _, spills, _, _, faults = compiled("sm_80", "row_lse", "float32", BN=128, num_warps=4)
    assert spills > 0
    assert faults[0] == f"{spills} spills"


def test_too_much_shared_memory_is_found() -> None:
    _, _, shared, _, faults = compiled("gfx942", "row_lse", "float16", BM=128, BN=512, num_stages=4)
    assert shared > 64 * 1024
    assert any("shared memory" in fault for fault in faults)


def test_a_dot_off_the_tensor_cores_is_found() -> None:
    _, _, _, matrix, faults = compiled("sm_90", "row_lse", "float32", PRECISION="ieee")
    assert matrix == ""
    assert "a dot without tensor cores" in faults


def test_kernels_that_start_early_wait_before_they_touch_memory() -> None:
    wait = "  // begin inline asm\n  griddepcontrol.wait;\n"
    parameter = "  ld.param.b64 %rd1, [kernel_param_0];\n"
    assert waits_first(parameter + wait + "  @%p1 ld.global.v4.b32 { %r1 }, [%rd1];\n")
    assert waits_first(parameter + wait)
    for early in (
        "  ld.global.b32 %r1, [%rd1];\n",
        "  @%p1 st.global.v4.b32 [%rd1], { %r1 };\n",
        "  atom.global.gpu.relaxed.add.u32 %r1, [%rd1], %r2;\n",
        "  ld.relaxed.gpu.global.u32 %r1, [%rd1];\n",
        "  cp.async.cg.shared.global [%r1], [%rd1], 0x10;\n",
    ):
        assert not waits_first(parameter + early + wait)
    assert not waits_first(parameter)
    assert compiled("sm_90", "update", "float16")[4] == []


WIDE = """
import json
import torch
from bench import aot
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import recording
from ocvtp_kernels.selection import triton as selection
from ocvtp_kernels.selection.shapes import FLAG

def empty(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="meta")

with pretend("sm90"), recording() as made:
    for width in (1024, 1001):
        selection.gather_tokens(empty(2, 576, width, dtype=torch.float16), empty(2, 64))
    rows, scores = empty(2, 576, 1024, dtype=torch.float16), empty(2, 576, dtype=torch.float32)
    selection.select_from_keys(empty(2, 9, 64), 64, scores, rows, empty(2, 576, dtype=torch.bool), FLAG)
print(json.dumps([aot.compile_launch(one, "sm_90").wide for one in made]))
"""


def test_rows_are_copied_16_bytes_at_a_time() -> None:
    """Where their width allows: that tells those that Triton was kept from specialising on it."""
    result = run("-c", WIDE)
    assert result.returncode == 0, result.stderr
    gather, ragged, select = json.loads(result.stdout)
    assert gather >= 2  # a load and a store
    assert select >= 2
    assert ragged == 0


def test_command_line() -> None:
    result = run("-m", "bench.aot", "--target", "gfx942", "--kernel", "head_mean")
    assert result.returncode == 0, result.stderr
    assert "gfx942  head_mean" in result.stdout
    assert "1 kernels compiled, 0 with faults" in result.stdout
    assert run("-m", "bench.aot", "--kernel", "nothing").returncode == 2


def test_a_fault_fails_the_command() -> None:
    code = (
        "import sys; from bench import aot; from ocvtp_kernels import _tiles\n"
        "aot.TARGETS['gfx942'] = aot.Target('hip', 'gfx942', 64, 'gfx942', shared_limit=-1)\n"
        "aot.ProcessPoolExecutor = Here\n"
        "sys.exit(aot.main(['--target', 'gfx942', '--kernel', 'head_mean']))"
    )
    here = (
        "class Here:\n"
        "    def __init__(self, *_, **__): pass\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def map(self, function, work, chunksize): return map(function, work)\n"
    )
    result = run("-c", here + code)
    assert result.returncode == 1, result.stderr
    assert "1 with faults" in result.stdout
    assert "<--" in result.stdout


def test_interpreted_kernels_are_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.aot"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr
