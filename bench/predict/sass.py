"""NVIDIA's machine code, as ``nvdisasm -c`` prints it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L_\S+):")
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"^@(!?)(U?P[0-9T]+)\s+")
_TARGET = re.compile(r"`\((\.L_\S+?)\)")
_REGISTER = re.compile(r"^[-~|!]*(U?R)(\d+|Z)\b")
_PREDICATE = re.compile(r"^!?(U?P)([0-6T])$")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: up to the first dot, ``LDG``.
        options: after it, ``("E", "128")``.
        operands: as printed, without ``.reuse``.
        guard: predicate it runs under, and whether that has to be false; ``None`` if it always runs.
        target: index of the instruction that a branch goes to.
    """

    name: str
    options: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None = None
    target: int | None = None

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that one thread moves with it, if it is an access to memory."""
        return next((_BYTES[option] for option in self.options if option in _BYTES), 4)


def parse(text: str) -> list[Instruction]:
    """Instructions of the first function in ``text``.

    Raises:
        ValueError: there is none, or a branch to a place that is not there.
    """
    rows: list[tuple[str, str | None]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(rows)
            continue
        found = _LINE.match(line)
        if found:
            target = _TARGET.search(found[1])
            rows.append((found[1], target[1] if target else None))
    if not rows:
        raise ValueError("no instruction was found")
    missing = {label for _, label in rows if label and label not in labels}
    if missing:
        raise ValueError(f"branches to {sorted(missing)}, which are not there")
    return [_instruction(text, None if label is None else labels[label]) for text, label in rows]


def _instruction(text: str, target: int | None) -> Instruction:
    guard = None
    found = _GUARD.match(text)
    if found:
        guard = found[2], bool(found[1])
        text = text[found.end() :]
    word, _, rest = text.partition(" ")
    name, *options = word.split(".")
    operands = tuple(part.strip().replace(".reuse", "") for part in rest.split(",")) if rest.strip() else ()
    return Instruction(name, tuple(options), operands, guard, target)


def register(operand: str) -> str | None:
    """``R5`` of ``-R5.reuse``; ``None`` where it is none, or the one that is always zero."""
    found = _REGISTER.match(operand)
    return None if found is None or found[2] == "Z" else found[1] + found[2]


def is_predicate(operand: str) -> bool:
    """Whether it is ``P0``, ``!UP1``, ``PT``."""
    return _PREDICATE.match(operand) is not None


def following(name: str, offset: int) -> str:
    """``R7`` for ``R5`` and 2."""
    kind = name.rstrip("0123456789")
    return f"{kind}{int(name[len(kind) :]) + offset}"


def multiply_adds(one: Instruction) -> int:
    """Multiply-adds that one warp does with a product on tensor cores; 0 for another instruction.

    ``HGMMA.64x128x16`` is issued by the four warps of a group together, ``HMMA.16816`` by one.
    """
    shape = _product(one)
    if shape is None:
        return 0
    rows, columns, depth = shape
    return rows * columns * depth // (4 if one.name.endswith("GMMA") else 1)


def _product(one: Instruction) -> Sequence[int] | None:
    if one.name.endswith("GMMA"):
        sizes = next((option for option in one.options if re.fullmatch(r"\d+x\d+x\d+", option)), None)
        return None if sizes is None else [int(size) for size in sizes.split("x")]
    if one.name in ("HMMA", "IMMA", "QMMA"):
        digits = next((option for option in one.options if re.fullmatch(r"\d{4,5}", option)), None)
        # 1688 is 16 x 8 x 8, 16816 is 16 x 8 x 16.
        return None if digits is None else [int(digits[:2]), int(digits[2]), int(digits[3:])]
    return None


#: Classes of instructions, as the tables name them; the first that fits. What fits none is integer.
CLASSES: tuple[tuple[str, frozenset[str]], ...] = (
    ("mma", frozenset({"HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "WARPGROUP"})),
    ("async", frozenset({"LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG"})),
    ("memory", frozenset({"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG"})),
    ("shared", frozenset({"LDS", "STS", "LDSM", "STSM", "MOVM", "ATOMS"})),
    ("mufu", frozenset({"MUFU"})),
    ("shfl", frozenset({"SHFL", "REDUX", "CREDUX"})),
    (
        "fp",
        frozenset(
            {"FFMA", "FADD", "FMUL", "FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "FCHK", "FSWZADD", "FRND"}
            | {"HADD2", "HFMA2", "HMUL2", "HMNMX2", "HSETP2", "DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
            | {"F2F", "F2FP", "F2I", "I2F", "I2FP"}
        ),
    ),
    (
        "sync",
        frozenset(
            {"BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE", "BSYNC", "BSSY", "NANOSLEEP", "ERRBAR", "CCTL"}
            | {"SYNCS", "WARPSYNC", "ACQBULK", "BREAK", "CGAERRBAR"}
        ),
    ),
    ("branch", frozenset({"BRA", "EXIT", "CALL", "RET", "BRX", "NOP", "YIELD"})),
)
INTEGER = "int"
CLASS_NAMES = (*(name for name, _ in CLASSES), INTEGER)


@functools.cache
def class_of(name: str) -> str:
    """The class of instructions of this name."""
    return next((label for label, names in CLASSES if name in names), INTEGER)
