"""One launch of the product, compiled for an H100 and counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.aot import TARGETS, compiled_for, disassemble, specialise
from bench.predict import hopper
from bench.predict.machine import REGION, WARP, Counted, Machine
from bench.predict.sass import CLASS_NAMES, Instruction, class_of, multiply_adds, parse
from ocvtp_kernels._launch import Launch

TARGET = "sm_90"
#: Threads that are followed at most; of a larger launch, programs spread evenly over it stand for all.
MOST_LANES = 1 << 15


class Binary(NamedTuple):
    """A compiled kernel.

    Attributes:
        code: its instructions.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        offsets: of its parameters, in the constant bank.
    """

    code: list[Instruction]
    registers: int
    shared: int
    offsets: list[int]


@dataclass(frozen=True)
class Counts:
    """What one launch executes and moves, all programs together unless it says otherwise.

    Attributes:
        kernel: its name; ``variant``: those of its constants that are true.
        programs: how many, each of ``warps`` warps.
        registers: of a thread.
        shared: bytes, of a program.
        resident: programs that fit on one multiprocessor.
        instructions: that a warp executes, by class, on average.
        multiply_adds: on tensor cores, padding included; ``half`` of them on 16-bit operands, others TF32.
        l2: bytes that programs and L2 exchange, in sectors of 32.
        stored: bytes that threads write, each of which is in ``l2`` too.
        dram: bytes that have to come from or go to memory at least if nothing of them is in L2.
        followed: how many programs these numbers are from.
        dependent: whether it may start before the launch in front of it has ended.
        notes: what could not be derived, in words.
        outputs: bytes written, by the number of the buffer (:func:`buffer_number`).
    """

    kernel: str
    variant: str
    programs: int
    warps: int
    registers: int
    shared: int
    resident: int
    instructions: dict[str, float]
    multiply_adds: float
    half: float
    l2: float
    stored: float
    dram: float
    followed: int
    dependent: bool = False
    notes: tuple[str, ...] = ()
    outputs: dict[int, float] = field(default_factory=dict)

    @property
    def executed(self) -> float:
        """Instructions that a warp executes."""
        return sum(self.instructions.values())

    @property
    def waves(self) -> float:
        """Programs over those that the GPU holds at once."""
        return self.programs / (self.resident * hopper.PROCESSORS)


def compiled(launch: Launch) -> Binary:
    """Compile a launch and take it apart."""
    made = compiled_for(launch, TARGETS[TARGET])
    parts = disassemble(made, elf=True)
    return Binary(parse(parts.sass), parts.registers, int(made.metadata.shared), parameters(parts.elf))


def parameters(elf: str) -> list[int]:
    """Where a kernel finds its parameters in the constant bank, in their order.

    Raises:
        ValueError: the sections don't say.
    """
    base = re.search(r"EIATTR_PARAM_CBANK\s+Format:\s+\S+\s+Value:\s+\S+\s+0x([0-9a-f]+)", elf)
    found = re.findall(r"Ordinal : 0x([0-9a-f]+)\s+Offset  : 0x([0-9a-f]+)", elf)
    if base is None or not found:
        raise ValueError("the ELF sections don't say where parameters are")
    first = int(base[1], 16) & 0xFFFF
    by_number = {int(number, 16): first + int(offset, 16) for number, offset in found}
    return [by_number[number] for number in sorted(by_number)]


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that fit on one multiprocessor at a time."""
    rounded = -(-registers // hopper.REGISTER_UNIT) * hopper.REGISTER_UNIT
    by_registers = hopper.REGISTERS // (rounded * warps * WARP)
    by_shared = hopper.SHARED // (shared + hopper.SHARED_OWN)
    return max(1, min(by_registers, by_shared, hopper.THREADS // (warps * WARP), hopper.PROGRAMS))


def count(launch: Launch, binary: Binary, most: int = MOST_LANES) -> Counts:
    """Count what ``launch`` does.

    Raises:
        UnknownCodeError: its machine code can't be followed.
    """
    return count_programs(launch, binary, range(_total(launch)), most=most)


def count_programs(
    launch: Launch, binary: Binary, chosen: Sequence[int], *, most: int = MOST_LANES, tickets: bool = False
) -> Counts:
    """Count some programs of a launch: those at ``chosen`` places of its grid, x running fastest.

    Args:
        launch: a recorded launch, whose tensors may be on ``meta``.
        binary: what it was compiled to.
        chosen: the programs.
        most: threads to follow.
        tickets: a program's task is the result of its first atomic addition, and takes its place in the grid
            for it: programs do tasks in their order.
    """
    warps = int(launch.tile["num_warps"])
    threads = warps * WARP
    spread = _spread(chosen, max(1, most // threads))
    tensors = _Buffers(launch)
    programs = np.repeat(np.array(spread, dtype=np.int64), threads)
    grid = [*launch.grid, 1, 1][:3]
    lane = np.tile(np.arange(WARP, dtype=np.int64), len(spread) * warps)
    special = {
        "SR_TID.X": np.tile(np.arange(threads, dtype=np.int64), len(spread)),
        "SR_TID.Y": 0,
        "SR_TID.Z": 0,
        "SR_LANEID": lane,
        "SR_LTMASK": (np.int64(1) << lane) - 1,
        "SR_CTAID.X": programs % grid[0],
        "SR_CTAID.Y": programs // grid[0] % grid[1],
        "SR_CTAID.Z": programs // (grid[0] * grid[1]),
        "SR_CgaCtaId": 0,
    }
    constants = _constants(launch, binary.offsets, tensors, threads, grid)
    machine = Machine(
        binary.code, constants, special, len(spread), threads, tickets=programs if tickets else None
    )
    counted = machine.run()
    return _counts(launch, binary, counted, tensors, chosen=len(chosen), followed=len(spread))


def _counts(
    launch: Launch, binary: Binary, counted: Counted, tensors: _Buffers, *, chosen: int, followed: int
) -> Counts:
    warps = int(launch.tile["num_warps"])
    share = chosen / followed
    instructions = dict.fromkeys(CLASS_NAMES, 0.0)
    products = half = 0
    for one, times in zip(binary.code, counted.executed, strict=True):
        instructions[class_of(one.name)] += times / (followed * warps)
        if times:
            products += times * multiply_adds(one)
            half += times * multiply_adds(one) * ("TF32" not in one.options)
    l2 = (counted.read + counted.written + counted.unknown) * share
    touched = sum(tensors.sizes[number] for number in counted.read_tensors)
    touched += sum(tensors.sizes[number] for number in counted.stored)
    notes = []
    if counted.undecided:
        notes.append(f"{len(counted.undecided)} branches depend on data: their loops count once")
    if counted.unknown:
        part = counted.unknown / (counted.read + counted.written + counted.unknown)
        notes.append(f"{100 * part:.0f} % of L2 bytes depend on data, counted as if no thread were masked")
    return Counts(
        kernel=launch.kernel.fn.__name__,
        variant=" ".join(name.lower() for name, value in launch.tile.items() if value is True),
        programs=chosen,
        warps=warps,
        registers=binary.registers,
        shared=binary.shared,
        resident=resident(binary.registers, binary.shared, warps),
        instructions=instructions,
        multiply_adds=products * share,
        half=half * share,
        l2=l2,
        stored=sum(counted.stored.values()) * share,
        dram=min(float(touched), l2) if not counted.unknown else l2,
        followed=followed,
        dependent=bool(launch.tile.get("PDL", False)),
        notes=tuple(notes),
        outputs={number: nbytes * share for number, nbytes in counted.stored.items()},
    )


class _Buffers:
    """A place in memory for every storage among a launch's arguments; their numbers and sizes."""

    def __init__(self, launch: Launch) -> None:
        self.sizes: list[int] = []
        self._numbers: dict[int, int] = {}
        for value in launch.arguments:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()._cdata
                number = self._numbers.setdefault(storage, len(self._numbers))
                if number == len(self.sizes):
                    self.sizes.append(0)
                self.sizes[number] = max(self.sizes[number], value.numel() * value.element_size())

    def address(self, tensor: torch.Tensor) -> int:
        """Of its first element."""
        number = self._numbers[tensor.untyped_storage()._cdata]
        return ((number + 1) << REGION) + int(tensor.storage_offset()) * tensor.element_size()

    def number(self, tensor: torch.Tensor) -> int:
        """Of its storage."""
        return self._numbers[tensor.untyped_storage()._cdata]


def buffer_number(launch: Launch, tensor: torch.Tensor) -> int:
    """Under which number :attr:`Counts.outputs` has what is written into ``tensor``, one of its arguments."""
    return _Buffers(launch).number(tensor)


def _constants(
    launch: Launch, offsets: Sequence[int], tensors: _Buffers, threads: int, grid: Sequence[int]
) -> dict[int, int]:
    """Words of the constant bank: sizes of program and grid at its begin, then parameters."""
    words = dict(zip(hopper.DIMENSIONS, (threads, 1, 1, *grid), strict=True))
    signature, _, _ = specialise(launch)
    values = iter(launch.arguments)
    place = iter(offsets)
    for parameter in launch.kernel.params:
        if parameter.is_constexpr:
            continue
        value: Any = next(values)
        if signature[parameter.name] == "constexpr":  # a 1, which became part of the code
            continue
        at = next(place)
        if isinstance(value, float):
            words[at] = int(np.float32(value).view(np.uint32))
            continue
        number = tensors.address(value) if isinstance(value, torch.Tensor) else int(value)
        words[at] = number & 0xFFFFFFFF
        if isinstance(value, torch.Tensor) or signature[parameter.name] == "i64":
            words[at + 4] = number >> 32 & 0xFFFFFFFF
    return words


def _total(launch: Launch) -> int:
    total = 1
    for size in launch.grid:
        total *= size
    return total


def _spread(chosen: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of them: one of each of as many equal parts, not always at the same place in it."""
    if len(chosen) <= most:
        return list(chosen)
    step = len(chosen) / most
    # The golden ratio's multiples fill a unit evenly: no period of the grid meets them.
    return [chosen[int(step * (part + (0.618033988749895 * part) % 1.0))] for part in range(most)]


class Counter:
    """Compiles and counts launches, each that is like another only once."""

    def __init__(self) -> None:
        self._binaries: dict[str, Binary] = {}
        self._counts: dict[str, Counts] = {}

    def of(self, launch: Launch, chosen: range | None = None) -> Counts:
        """What a launch does, or its programs ``chosen``, where they take tasks in the order of tickets."""
        buffers = _Buffers(launch)
        arguments = [
            (buffers.address(value), tuple(value.shape), value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for value in launch.arguments
        ]
        name, tile = launch.kernel.fn.__name__, sorted(launch.tile.items())
        compiled_as = str((name, specialise(launch), tile))
        key = str((compiled_as, launch.grid, arguments, chosen))
        if key not in self._counts:
            if compiled_as not in self._binaries:
                self._binaries[compiled_as] = compiled(launch)
            programs = range(_total(launch)) if chosen is None else chosen
            self._counts[key] = count_programs(
                launch, self._binaries[compiled_as], programs, tickets=bool(launch.phases)
            )
        return self._counts[key]
