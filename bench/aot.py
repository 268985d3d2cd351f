"""Compiles every kernel at every tile of the table, without a GPU: ``python -m bench.aot``.

Launches are recorded from the launchers themselves, on shapes that reach every row of the tile table, so
what is compiled is what a GPU would run. Prints registers, spills, shared memory and matrix instructions, and
exits with 1 if a kernel spills, exceeds a limit of its architecture, or has a dot that missed the tensor
cores; and if any of these numbers is not the one in bench/results/counts/aot.json, which --write renews.
--changed leaves out what Triton translates to the program that the snapshot was taken of, but for a few.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import aot_snapshot
from bench.harness import package_version, provenance
from bench.launches import launches
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels._launch import Launch
from ocvtp_kernels._launch import options as launch_options


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's name of it, rows of the tile table, shared memory a block may have."""

    backend: str
    arch: int | str
    warp: int
    tiles: str
    shared_limit: int


KB = 1024
#: Shared memory: CUDA programming guide, "technical specifications per compute capability"; CDNA3 ISA guide.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, "sm80", 163 * KB),
    "sm_86": Target("cuda", 86, 32, "sm86", 99 * KB),
    "sm_90": Target("cuda", 90, 32, "sm90", 227 * KB),
    "sm_100": Target("cuda", 100, 32, "sm100", 227 * KB),
    "sm_120": Target("cuda", 120, 32, "sm86", 99 * KB),
    "gfx942": Target("hip", "gfx942", 64, "gfx942", 64 * KB),
}
#: Kernels that copy rows, which takes 16 bytes an instruction where sizes allow: those are counted.
COPIES = ("average", "gather", "scatter", "select", "spread")
_WIDE = re.compile(r"\b(?:(?:LDG|STG)\S*\.128|global_(?:load|store)_(?:dwordx4|b128))\b")
_MATRIX = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "QMMA")
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs. Counts are instructions, shared memory is bytes.

    ``program``: of what was compiled, see :func:`program`.
    ``wide``: loads and stores of 16 bytes, of kernels that copy rows; ``None`` of others.
    """

    target: str
    kernel: str
    variant: str
    registers: int
    spills: int
    shared: int
    matrix: str
    faults: tuple[str, ...]
    program: str
    wide: int | None = None

    def row(self) -> dict[str, int | str]:
        """What the snapshot holds of it."""
        row = {name: getattr(self, name) for name in ("registers", "spills", "shared", "matrix", "program")}
        return row if self.wide is None else {**row, "wide": self.wide}


def compile_launch(launch: Launch, target: str) -> Usage:
    """Compile one recorded launch for ``target`` and read its machine code."""
    gpu = TARGETS[target]
    compiled = compiled_for(launch, gpu)
    registers, spills, matrix, code = (_read_hip if gpu.backend == "hip" else _read_cuda)(compiled)
    name = launch.kernel.fn.__name__
    shared = int(compiled.metadata.shared)
    faults = []
    if spills:
        faults.append(f"{spills} spills")
    if shared > gpu.shared_limit:
        faults.append(f"{shared} bytes of shared memory, more than {gpu.shared_limit}")
    if launch.tile.get("PDL") and not waits_first(compiled.asm["ptx"]):
        faults.append("memory that launches before may be writing is touched before the wait for them")
    if "tt.dot" in compiled.asm["ttir"] and not matrix:
        faults.append("a dot without tensor cores")
    wide = len(_WIDE.findall(code)) if name in COPIES else None
    variant, made = _variant(launch), program(launch, gpu)
    return Usage(target, name, variant, registers, spills, shared, matrix, tuple(faults), made, wide)


def waits_first(ptx: str) -> bool:
    """Whether a kernel that starts early waits for the launches before it touches memory of theirs."""
    wait = ptx.find("griddepcontrol.wait")
    touched = re.search(r"\b(?:(?:ld|st|atom|red)\.[\w.:]*global|cp\.async)", ptx)
    return wait >= 0 and (touched is None or wait < touched.start())


def compiled_for(launch: Launch, gpu: Target) -> Any:
    """What Triton makes of one recorded launch."""
    import triton

    source, target, options = _source(launch, gpu)
    return triton.compile(source, target=target, options=options)


def program(launch: Launch, gpu: Target) -> str:
    """Of everything that decides what Triton's compiler makes of a launch, but for its version: 16 digits.

    That is the launch in Triton's first language, without names of files and numbers of lines, and options.
    It takes a twentieth of the time of compiling.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, target, given = _source(launch, gpu)
    backend = make_backend(target)
    options = backend.parse_options({**given, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    text = source.make_ir(target, options, functions, modules, context).str_nodebug()
    return hashlib.sha256(f"{target} {sorted(given.items())}\n{text}".encode()).hexdigest()[:16]


def _source(launch: Launch, gpu: Target) -> tuple[Any, Any, dict[str, Any]]:
    """For Triton's compiler: what, for whom, and with which options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    options = {name: launch.tile[name] for name in ("num_warps", "num_stages") if name in launch.tile}
    options |= launch_options(launch.tile)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, GPUTarget(gpu.backend, gpu.arch, gpu.warp), options


def specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and divisibilities that Triton's launcher would derive from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    arguments = iter(launch.arguments)
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = launch.tile[parameter.name]
            continue
        value = next(arguments)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    assert next(arguments, None) is None
    return signature, constants, attributes


def keys(target: str) -> list[str]:
    """A name for each launch of ``target``, by which the snapshot knows it."""
    made = launches(TARGETS[target].tiles)
    return aot_snapshot.keys(made, [f"{one.kernel.fn.__name__} {_variant(one)}" for one in made])


def _variant(launch: Launch) -> str:
    dtypes = [_TYPES[value.dtype] for value in launch.arguments if isinstance(value, torch.Tensor)]
    numbers = " ".join(f"{name}={value}" for name, value in launch.tile.items())
    return f"{dtypes[0]} {numbers}"


class Disassembly(NamedTuple):
    """What NVIDIA's tools print of a compiled kernel: its resources, machine code and ELF sections."""

    usage: str
    sass: str
    elf: str

    @property
    def registers(self) -> int:
        """Of a thread."""
        found = re.search(r"REG:(\d+)", self.usage)
        if found is None or not self.sass:
            raise RuntimeError("cuobjdump or nvdisasm printed nothing that could be read")
        return int(found[1])


def disassemble(compiled: Any, elf: bool = False) -> Disassembly:
    """Take a kernel for NVIDIA apart; its ELF sections only if asked for."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(tools / "nvdisasm", "-ndf", "-c", file.name)
        return Disassembly(usage, sass, _output(tools / "cuobjdump", "-elf", file.name) if elf else "")


def _read_cuda(compiled: Any) -> tuple[int, int, str, str]:
    found = disassemble(compiled)
    matrix = [name for name in _MATRIX if re.search(rf"\b{name}\b", found.sass)]
    return found.registers, len(re.findall(r"\b(?:STL|LDL)\b", found.sass)), " ".join(matrix), found.sass


def _read_hip(compiled: Any) -> tuple[int, int, str, str]:
    assembly = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no {name} in the assembly")
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, not to memory: not counted.
    spills = note("vgpr_spill_count") + note("private_segment_fixed_size") // 4
    matrix = sorted(set(re.findall(r"v_mfma_\w+", assembly)))
    return note("vgpr_count"), spills, " ".join(matrix), assembly


def _output(*command: str | os.PathLike[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _task(task: tuple[str, int, str]) -> Usage | None:
    """``None``: this would compile the program that is named."""
    target, index, accepted = task
    launch = launches(TARGETS[target].tiles)[index]
    if accepted and accepted == program(launch, TARGETS[target]):
        return None
    return compile_launch(launch, target)


def tasks(targets: list[str], kernels: list[str]) -> Iterator[tuple[str, int]]:
    """``(target, index into its launches)`` of everything to compile."""
    for target in targets:
        for index, launch in enumerate(launches(TARGETS[target].tiles)):
            if not kernels or launch.kernel.fn.__name__ in kernels:
                yield target, index


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--kernel", action="append", help="default: all")
    parser.add_argument("--changed", action="store_true", help="only what the snapshot was not taken of")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="accept what was compiled: renew the snapshot")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("unset TRITON_INTERPRET: interpreted kernels can't be compiled")
    targets = options.target or list(TARGETS)
    work = list(tasks(targets, options.kernel or []))
    if not work:
        parser.error(f"no kernel is called {' or '.join(options.kernel)}")
    names = {target: keys(target) for target in targets}
    version = str(package_version("triton"))
    accepted = aot_snapshot.trusted(version, aot_snapshot.PATH) if options.changed else {}
    before = [accepted.get(target, {}).get(names[target][index]) for target, index in work]
    tried = [(*task, row["program"] if row else "") for task, row in zip(work, before, strict=True)]
    found: aot_snapshot.Rows = {target: {} for target in targets}
    failed = skipped = 0
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(_task, tried, chunksize=4)
        for (target, index), row, usage in zip(work, before, results, strict=True):
            key = names[target][index]
            if usage is None:
                assert row is not None
                found[target][key] = row
                skipped += 1
                continue
            print(_line(usage), flush=True)
            failed += bool(usage.faults)
            found[target][key] = usage.row()
    print(f"{len(work) - skipped} kernels compiled, {failed} with faults")
    if skipped:
        print(f"{skipped} are the programs that {aot_snapshot.PATH.name} was taken of")
    if not options.write:
        lines, same = aot_snapshot.compare(
            found, version=version, whole=not options.kernel, path=aot_snapshot.PATH
        )
        print(*lines, sep="\n")
        return int(failed > 0 or not same)
    if failed:
        print("faults are not accepted: nothing written")
        return 1
    try:
        aot_snapshot.renew(
            found,
            version=version,
            commit=provenance()["commit"],
            kernels=options.kernel or (),
            order=TARGETS,
            path=aot_snapshot.PATH,
        )
    except aot_snapshot.MixedVersionsError as error:
        parser.error(str(error))
    return 0


def _line(usage: Usage) -> str:
    row = asdict(usage)
    row["shared"] = f"{usage.shared / KB:.0f}K"
    row["end"] = f"  <-- {', '.join(usage.faults)}" if usage.faults else ""
    return "{target:7} {kernel:12} {registers:3}r {spills:3}sp {shared:>5} {matrix:8} {variant}{end}".format(
        **row
    )


if __name__ == "__main__":
    sys.exit(main())
