"""What NVIDIA's integer instructions compute, as far as addresses, masks and loops need them.

A value is 32 bits: an ``int`` where all lanes have the same, an int64 array ``[lanes]`` of numbers in
``[0, 2^32)``, or ``None`` where it is not known. A predicate is a ``bool``, an array of them, or ``None``.
NVIDIA documents names alone ("CUDA Binary Utilities", instruction set); the meaning follows from what ptxas
makes of PTX, whose instructions are documented, and is held by tests that count what kernels are known to
move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Value = Any
Predicate = Any
WORD = 0xFFFFFFFF


def signed(value: Value) -> Value:
    """The word as a two's complement number."""
    return (value ^ 0x80000000) - 0x80000000


def word(value: Value) -> Value:
    """Its low 32 bits."""
    return value & WORD


def wide(low: Value, high: Value) -> Value:
    """Two words as a signed number of 64 bits."""
    return (signed(high) << 32) | low


def choose(condition: Predicate, yes: Value, no: Value) -> Value:
    """``yes`` where ``condition``; nothing is known where it is not."""
    if isinstance(condition, (bool, np.bool_)):
        return yes if condition else no
    if condition is None or yes is None or no is None:
        return None
    return np.where(condition, yes, no)


def _number(condition: Predicate) -> Value:
    return int(condition) if isinstance(condition, (bool, np.bool_)) else condition.astype(np.int64)


def add3(a: Value, b: Value, c: Value, carries: Sequence[Predicate] = ()) -> tuple[Value, Value]:
    """``IADD3``: the sum's low word, and how often it carried."""
    total = a + b + c
    for carry in carries:
        total = total + _number(carry)
    return word(total), total >> 32


def multiply(a: Value, b: Value, unsigned: bool) -> Value:
    """The product, of 64 bits at most."""
    if unsigned:
        return a * b
    return signed(a) * signed(b)


def lut3(a: Value, b: Value, c: Value, table: int) -> Value:
    """``LOP3.LUT``: each bit by a table of eight, a's bit the highest."""
    result: Value = 0
    for row in range(8):
        if table >> row & 1:
            term = (a if row & 4 else a ^ WORD) & (b if row & 2 else b ^ WORD) & (c if row & 1 else c ^ WORD)
            result = result | term
    return result


def lut3_predicate(a: Predicate, b: Predicate, c: Predicate, table: int) -> Predicate:
    """``PLOP3.LUT``; an input that the table doesn't look at need not be known."""
    inputs = [a, b, c]
    for place, bit in ((0, 4), (1, 2), (2, 1)):
        if inputs[place] is None and all((table >> row ^ table >> (row ^ bit)) & 1 == 0 for row in range(8)):
            inputs[place] = False
    if any(one is None for one in inputs):
        return None
    result: Predicate = False
    for row in range(8):
        if table >> row & 1:
            x, y, z = (one if row & bit else _not(one) for one, bit in zip(inputs, (4, 2, 1), strict=True))
            result = result | (x & y & z)
    return result


def _not(condition: Predicate) -> Predicate:
    return not condition if isinstance(condition, (bool, np.bool_)) else ~condition


def negated(condition: Predicate) -> Predicate:
    """Not ``condition``."""
    return None if condition is None else _not(condition)


def both(a: Predicate, b: Predicate) -> Predicate:
    """``a`` and ``b``; known to be false if one of them is."""
    if a is False or b is False:
        return False
    return None if a is None or b is None else a & b


def funnel(low: Value, high: Value, shift: Value, options: Sequence[str]) -> Value:
    """``SHF``: a word of two that are shifted together, ``L`` or ``R``, the upper one with ``HI``."""
    arithmetic = "S32" in options or "S64" in options
    long = "U64" in options or "S64" in options
    most = 63 if long else 32
    if "W" in options:
        shift = shift & (63 if long else 31)
    else:
        shift = min(shift, most) if isinstance(shift, int) else np.minimum(shift, most)
    whole = wide(low, high)
    if "L" in options:
        shifted = whole << shift
        return word(shifted >> 32) if "HI" in options else word(shifted)
    if "HI" in options:
        return word((signed(high) if arithmetic else high) >> shift)
    shifted = word(whole >> shift)
    if arithmetic or not long:  # by 32 at most, only bits of the two words come down
        return shifted
    beyond = max(shift - 32, 0) if isinstance(shift, int) else np.maximum(shift - 32, 0)
    return choose(shift > 32, high >> beyond, shifted)


def permuted(a: Value, selector: Value, b: Value) -> Value:
    """``PRMT``: four bytes of eight, ``b`` above ``a``; a selector's upper bit repeats the byte's sign."""
    result: Value = 0
    for place in range(4):
        pick = selector >> (4 * place) & 0xF
        byte = _byte(a, b, pick & 7)
        sign = (byte >> 7 & 1) * 0xFF
        byte = choose((pick & 8) != 0, sign, byte)
        result = result | (byte << (8 * place))
    return result


def _byte(a: Value, b: Value, pick: Value) -> Value:
    if isinstance(pick, int):
        return ((a if pick < 4 else b) >> (8 * (pick & 3))) & 0xFF
    source = np.where(pick < 4, a, b)
    return (source >> (8 * (pick & 3))) & 0xFF


def extended(value: Value, bits: int, unsigned: bool) -> Value:
    """``SGXT``: the lowest bits, as a number with or without a sign."""
    low = value & ((1 << bits) - 1)
    return low if unsigned else word((low ^ (1 << (bits - 1))) - (1 << (bits - 1)))


def float_of(value: Value, round_up: bool, unsigned: bool) -> Value:
    """``I2F``: the bits of the float32 nearest an integer, or next above."""
    numbers = np.asarray(value if unsigned else signed(value), dtype=np.float64)
    floats = numbers.astype(np.float32)
    if round_up:
        floats = np.where(
            floats.astype(np.float64) < numbers, np.nextafter(floats, np.float32(np.inf)), floats
        )
    return _bits(floats, value)


def reciprocal(value: Value) -> Value:
    """``MUFU.RCP`` of a float32, by its bits. The hardware's may be off by one in the last place."""
    with np.errstate(all="ignore"):
        return _bits(np.float32(1) / _floats(value), value)


def integer_of(value: Value) -> Value:
    """``F2I.U32.TRUNC`` of a float32, by its bits."""
    floats = np.nan_to_num(_floats(value).astype(np.float64), nan=0.0, posinf=2.0**32, neginf=0.0)
    numbers = np.clip(np.trunc(floats), 0, WORD).astype(np.int64)
    return int(numbers) if isinstance(value, int) else numbers


def _floats(value: Value) -> Any:
    return np.asarray(value, dtype=np.int64).astype(np.uint32).view(np.float32)


def _bits(floats: Any, like: Value) -> Value:
    bits = np.asarray(floats, dtype=np.float32).view(np.uint32).astype(np.int64)
    return int(bits) if isinstance(like, int) else bits


_COMPARISONS: dict[str, Callable[[Value, Value], Predicate]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def compared(a: Value, b: Value, options: Sequence[str], lower: Predicate = None) -> Predicate:
    """``ISETP`` without what it is combined with. With ``EX``, ``lower`` decides for equal upper words."""
    if "U32" not in options:
        a, b = signed(a), signed(b)
    how = options[0]
    if "EX" not in options:
        return _COMPARISONS[how](a, b)
    if lower is None:
        return None
    if how == "NE":
        return (a != b) | lower
    strictly = {"LT": "LT", "LE": "LT", "GT": "GT", "GE": "GT"}.get(how)
    tied = (a == b) & lower
    return tied if strictly is None else _COMPARISONS[strictly](a, b) | tied


def combined(a: Predicate, b: Predicate, options: Sequence[str]) -> Predicate:
    """Two predicates, joined as an instruction's ``AND``, ``OR`` or ``XOR`` says."""
    if "AND" in options:
        return both(a, b)
    if a is None or b is None:
        return True if "OR" in options and (a is True or b is True) else None
    return a | b if "OR" in options else a ^ b


def bits_set(value: Value) -> Value:
    """``POPC``."""
    if isinstance(value, int):
        return value.bit_count()
    return sum((value >> bit & 1) for bit in range(32))


def leading(value: Value) -> Value:
    """``FLO.U32``: the place of the highest bit, all ones where there is none."""
    numbers = np.asarray(value, dtype=np.int64)
    found = np.full(numbers.shape, WORD, dtype=np.int64)
    for bit in range(32):
        found = np.where(numbers >> bit & 1, bit, found)
    return int(found) if isinstance(value, int) else found
