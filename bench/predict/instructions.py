"""Instructions on integers, one function each: read operands, compute, write the result.

Each says whether it could: where a source is not known, or a form of the instruction isn't, nothing is
written, and the caller has to forget what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from bench.predict import integers
from bench.predict.integers import Predicate, Value
from bench.predict.sass import Instruction, following, is_predicate, register


class Registers(Protocol):
    """What instructions read and write."""

    def value(self, operand: str) -> Value:
        """Of a register, a constant or a number."""

    def pair(self, operand: str) -> Value:
        """Of two registers, 64 bits."""

    def predicate(self, operand: str) -> Predicate:
        """Of ``P0``, ``!UP1``, ``PT``."""

    def constant(self, operand: str, offset: int = 0) -> Value:
        """A word of the constant bank, ``c[0x0][0x210]``, some bytes on."""

    def special(self, name: str) -> Value:
        """Of a special register, ``SR_TID.X``."""

    def set(self, operand: str, value: Value) -> None:
        """Write a register."""

    def set_predicate(self, operand: str, value: Predicate) -> None:
        """Write a predicate."""

    def load_shared(self, one: Instruction) -> bool:
        """Load what a single thread has left in shared memory."""

    def vote(self, condition: Predicate) -> Value:
        """Of each lane's warp, a bit for every lane at work for which ``condition`` holds."""

    def shuffle(self, one: Instruction) -> bool:
        """Read a register of other lanes of the warp."""

    def take_ticket(self, one: Instruction) -> bool:
        """An atomic addition that hands out tasks."""


_Known = Callable[[Registers, Instruction], bool]


def _values(on: Registers, operands: Sequence[str]) -> list[Value] | None:
    values = [on.value(operand) for operand in operands]
    return None if any(value is None for value in values) else values


def _operands(one: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """Register written, predicates beside it, sources, and predicates at the end."""
    rest = list(one.operands)
    outputs = []
    while rest and is_predicate(rest[0]):
        outputs.append(rest.pop(0))
    target = rest.pop(0)
    while rest and is_predicate(rest[0]):
        outputs.append(rest.pop(0))
    inputs: list[str] = []
    while rest and is_predicate(rest[-1]):
        inputs.insert(0, rest.pop())
    return target, outputs, rest, inputs


def _add3(on: Registers, one: Instruction) -> bool:
    target, outputs, sources, inputs = _operands(one)
    values = _values(on, [*sources, *["RZ"] * (3 - len(sources))])
    carries = [on.predicate(name) for name in inputs] if "X" in one.options else []
    if values is None or any(carry is None for carry in carries):
        return False
    a, b, c = values
    result, carried = integers.add3(a, b, c, carries)
    for least, name in enumerate(outputs, 1):
        on.set_predicate(name, carried >= least)
    on.set(target, result)
    return True


def _imad(on: Registers, one: Instruction) -> bool:
    target, outputs, (a, b, c), inputs = _operands(one)
    unsigned = "U32" in one.options
    if "WIDE" in one.options or "HI" in one.options:
        values = _values(on, (a, b))
        added = on.pair(c)
        if values is None or added is None or inputs or outputs:
            return False
        total = integers.multiply(values[0], values[1], unsigned) + added
        high = integers.word(total >> 32)
        if "HI" in one.options:
            on.set(target, high)
            return True
        on.set(target, integers.word(total))
        name = register(target)
        if name is not None:
            on.set(following(name, 1), high)
        return True
    values = _values(on, (a, b, c))
    carries = [on.predicate(name) for name in inputs] if "X" in one.options else []
    if values is None or outputs or any(carry is None for carry in carries):
        return False
    result, _ = integers.add3(integers.word(values[0] * values[1]), values[2], 0, carries)
    on.set(target, result)
    return True


def _lea(on: Registers, one: Instruction) -> bool:
    target, outputs, sources, inputs = _operands(one)
    carries = [on.predicate(name) for name in inputs] if "X" in one.options else []
    shift = on.value(sources[-1])
    values = _values(on, sources[:-1])
    if values is None or not isinstance(shift, int) or any(carry is None for carry in carries):
        return False
    if "HI" in one.options:
        upper = integers.word(integers.signed(values[0]) >> 31) if "SX32" in one.options else values[2]
        shifted = integers.word((integers.wide(values[0], upper) << shift) >> 32)
    else:
        shifted = integers.word(values[0] << shift)
    result, carried = integers.add3(shifted, values[1], 0, carries)
    for least, name in enumerate(outputs, 1):
        on.set_predicate(name, carried >= least)
    on.set(target, result)
    return True


def _lop3(on: Registers, one: Instruction) -> bool:
    target, outputs, sources, _ = _operands(one)
    values = _values(on, sources)
    if values is None:
        return False
    result = integers.lut3(*values)
    for name in outputs:
        on.set_predicate(name, result != 0)
    on.set(target, result)
    return True


def _plop3(on: Registers, one: Instruction) -> bool:
    first, second, *rest = one.operands
    a, b, c = (on.predicate(name) for name in rest[:3])
    results = [integers.lut3_predicate(a, b, c, int(table, 16)) for table in rest[3:5]]
    for name, result in zip((first, second), results, strict=True):
        on.set_predicate(name, result)
    return True


def _isetp(on: Registers, one: Instruction) -> bool:
    first, second, a, b, with_, *lower = one.operands
    values = _values(on, (a, b))
    if values is None:
        return False
    below = on.predicate(lower[0]) if lower else None
    result = integers.compared(values[0], values[1], one.options, below)
    other = on.predicate(with_)
    on.set_predicate(first, integers.combined(result, other, one.options))
    on.set_predicate(second, integers.combined(integers.negated(result), other, one.options))
    return True


def _chosen(on: Registers, one: Instruction) -> bool:
    target, a, b, predicate = one.operands
    condition = on.predicate(predicate)
    on.set(target, integers.choose(condition, on.value(a), on.value(b)))
    return True


def _extreme(on: Registers, one: Instruction) -> bool:
    """``IMNMX``: the smaller, or with a false predicate the larger; ``VIADDMNMX``: of a sum and a number."""
    target, *numbers, predicate = one.operands
    values, least = _values(on, numbers), on.predicate(predicate)
    if values is None or least is None:
        return False
    *x, y = values
    x = integers.word(sum(x))
    below = x < y if "U32" in one.options else integers.signed(x) < integers.signed(y)
    smaller, larger = integers.choose(below, x, y), integers.choose(below, y, x)
    on.set(target, integers.choose(least, smaller, larger))
    return True


def _moved(on: Registers, one: Instruction) -> bool:
    on.set(one.operands[0], on.value(one.operands[1]))
    return True


def _constant(on: Registers, one: Instruction) -> bool:
    """``LDC``, ``ULDC``."""
    name = register(one.operands[0])
    words = 2 if "64" in one.options else 1
    if name is None or not {"64"}.issuperset(one.options):
        return False
    for offset in range(words):
        on.set(following(name, offset), on.constant(one.operands[1], 4 * offset))
    return True


def _special(on: Registers, one: Instruction) -> bool:
    """``S2R``, ``S2UR``, ``CS2R``."""
    name, source = register(one.operands[0]), one.operands[1]
    value = 0 if source == "SRZ" else on.special(source)
    if name is None or value is None:
        return False
    on.set(name, value)
    if one.name == "CS2R" and "32" not in one.options:
        on.set(following(name, 1), 0 if source == "SRZ" else None)
    return True


def _unary(function: Callable[[Value], Value]) -> _Known:
    def known(on: Registers, one: Instruction) -> bool:
        value = on.value(one.operands[-1])
        if value is None:
            return False
        on.set(one.operands[0], function(value))
        return True

    return known


def _funnel(on: Registers, one: Instruction) -> bool:
    target, low, shift, high = one.operands
    values = _values(on, (low, high, shift))
    if values is None:
        return False
    on.set(target, integers.funnel(values[0], values[1], values[2], one.options))
    return True


def _permuted(on: Registers, one: Instruction) -> bool:
    target, *sources = one.operands
    values = _values(on, sources)
    if values is None:
        return False
    on.set(target, integers.permuted(*values))
    return True


def _extended(on: Registers, one: Instruction) -> bool:
    value, bits = on.value(one.operands[1]), on.value(one.operands[2])
    if value is None or not isinstance(bits, int) or "W" in one.options:
        return False
    on.set(one.operands[0], integers.extended(value, bits, "U32" in one.options))
    return True


def _float_of(on: Registers, one: Instruction) -> bool:
    value = on.value(one.operands[-1])
    if value is None or {"F64", "F16", "U64", "S64"} & set(one.options):
        return False
    on.set(one.operands[0], integers.float_of(value, "RP" in one.options, "U32" in one.options))
    return True


def _integer_of(on: Registers, one: Instruction) -> bool:
    value = on.value(one.operands[-1])
    if value is None or not {"U32", "TRUNC"} <= set(one.options):
        return False
    on.set(one.operands[0], integers.integer_of(value))
    return True


def _mufu(on: Registers, one: Instruction) -> bool:
    value = on.value(one.operands[-1]) if one.options == ("RCP",) else None
    if value is None:
        return False
    on.set(one.operands[0], integers.reciprocal(value))
    return True


def _packed(on: Registers, one: Instruction) -> bool:
    """``P2R``: predicates as bits, where the mask has them."""
    target, _, base, mask = one.operands
    value, wanted = on.value(base), on.value(mask)
    if value is None or not isinstance(wanted, int) or one.options:
        return False
    result = value & ~wanted & integers.WORD
    for place in range(7):
        if wanted >> place & 1:
            predicate = on.predicate(f"P{place}")
            if predicate is None:
                return False
            result = result | integers.choose(predicate, 1 << place, 0)
    on.set(target, result)
    return True


def _unpacked(on: Registers, one: Instruction) -> bool:
    """``R2P``: the other way."""
    _, source, mask = one.operands
    value, wanted = on.value(source), on.value(mask)
    for place in range(7):
        if not isinstance(wanted, int) or wanted >> place & 1:
            known = value is not None and isinstance(wanted, int) and not one.options
            on.set_predicate(f"P{place}", (value >> place & 1) == 1 if known else None)
    return True


def _vote(on: Registers, one: Instruction) -> bool:
    """``VOTE.ANY``: who is there; the predicate beside it, whether anybody is."""
    if len(one.operands) != 3 or one.options != ("ANY",):
        return False
    target, output, given = one.operands
    condition = on.predicate(given)
    if condition is None:
        return False
    found = on.vote(condition)
    on.set_predicate(output, found != 0)
    on.set(target, found)
    return True


def _shuffled(on: Registers, one: Instruction) -> bool:
    return on.shuffle(one)


def _load_shared(on: Registers, one: Instruction) -> bool:
    return on.load_shared(one)


def _atomic(on: Registers, one: Instruction) -> bool:
    return on.take_ticket(one)


#: Instruction, or with a U in front, on uniform registers -> what it does; false where that is not known.
KNOWN: dict[str, _Known] = {
    "IADD3": _add3,
    "VIADD": _add3,
    "IADD": _add3,
    "IMAD": _imad,
    "LEA": _lea,
    "LOP3": _lop3,
    "PLOP3": _plop3,
    "ISETP": _isetp,
    "SEL": _chosen,
    "IMNMX": _extreme,
    "VIMNMX": _extreme,
    "VIADDMNMX": _extreme,
    "MOV": _moved,
    "R2UR": _moved,
    "LDC": _constant,
    "S2R": _special,
    "S2UR": _special,
    "CS2R": _special,
    "IABS": _unary(lambda value: abs(integers.signed(value))),
    "POPC": _unary(integers.bits_set),
    "FLO": _unary(integers.leading),
    "VOTE": _vote,
    "VOTEU": _vote,
    "SHFL": _shuffled,
    "SHF": _funnel,
    "PRMT": _permuted,
    "SGXT": _extended,
    "I2F": _float_of,
    "I2FP": _float_of,
    "F2I": _integer_of,
    "MUFU": _mufu,
    "P2R": _packed,
    "R2P": _unpacked,
    "LDS": _load_shared,
    "ATOMG": _atomic,
    "ATOM": _atomic,
}
